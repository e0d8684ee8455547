"""The version of the installed distribution: pyproject.toml is its only home."""

__all__ = ["__version__"]

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("sdxl-trt")
except PackageNotFoundError:
    __version__ = "unknown"
