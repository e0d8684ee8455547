"""Decoded tensors to pictures, and pictures to files."""

__all__ = ["save_png", "to_uint8", "to_uint8_truncated"]

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines.base import Array
from sdxl_trt.engines.files import atomic_write

if TYPE_CHECKING:
    from PIL.Image import Image


def to_uint8(sample: Array) -> NDArray[np.uint8]:
    """Return pixels (n, h, w, 3) of a decoded sample (n, 3, h, w) in [-1, 1], rounded as diffusers rounds."""
    scaled = np.clip(sample.astype(np.float32) / 2.0 + 0.5, 0.0, 1.0) * 255.0
    pixels: NDArray[np.uint8] = np.rint(scaled).astype(np.uint8)
    return pixels.transpose(0, 2, 3, 1)


def to_uint8_truncated(sample: Array) -> NDArray[np.uint8]:
    """Return pixels (n, h, w, 3) of a decoded sample (n, 3, h, w) in [-1, 1], cut off as ComfyUI's SaveImage does."""
    # The operations and their order are ComfyUI's: a rounding before the cut decides between two pixel values.
    scaled = np.clip((sample.astype(np.float32) + 1.0) / 2.0, 0.0, 1.0) * 255.0
    pixels: NDArray[np.uint8] = scaled.astype(np.uint8)
    return pixels.transpose(0, 2, 3, 1)


def save_png(image: "Image", path: Path, texts: dict[str, str]) -> None:
    """Write `image` as PNG with `texts` as text chunks, atomically."""
    from PIL.PngImagePlugin import PngInfo  # noqa: PLC0415 - Pillow is loaded with the first picture

    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    with atomic_write(path) as file:
        image.save(file, format="PNG", pnginfo=info)
