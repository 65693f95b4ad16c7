"""The one place that knows it; pyproject.toml reads it from here, and saved models carry it."""

__version__ = "1.0.0"
