"""The location of the embedded pair's exported bundle, and a note for its users."""

__all__ = ["NOTE", "bundle_path"]

from pathlib import Path

NOTE = (
    "this is the embedded pair, a miniature of SDXL trained on drawn shapes: it knows shapes, colours and"
    " backgrounds, and nothing else"
)


def bundle_path() -> Path:
    """Return the folder of the embedded bundle, which is package data and the default of ``trt-generate``."""
    return Path(__file__).with_name("bundle")
