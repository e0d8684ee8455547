"""Decoded tensors to pixels."""

__all__ = ["to_uint8", "to_uint8_truncated"]

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines.base import Array


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
