"""Hard-links finished Glance images into Nova's shared image cache."""

__version__ = "0.3.0"
