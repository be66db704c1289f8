"""Tests of single modules: no cloud, in seconds."""
