"""Tests with real services, mounts and processes."""
