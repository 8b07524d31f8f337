"""The version, for the package, its builds and its results; the only place where it is written."""

__version__ = "0.1.0"
