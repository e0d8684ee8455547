"""Decoded tensors to pixels."""

__all__ = ["from_unit", "to_uint8", "to_uint8_truncated", "to_unit"]

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines.engine import Array


def to_uint8(sample: Array) -> NDArray[np.uint8]:
    """Return pixels (n, h, w, 3) of a decoded sample (n, 3, h, w) in [-1, 1], rounded as diffusers rounds."""
    scaled = np.clip(sample.astype(np.float32) / 2.0 + 0.5, 0.0, 1.0) * 255.0
    pixels: NDArray[np.uint8] = np.rint(scaled).astype(np.uint8)
    return pixels.transpose(0, 2, 3, 1)


def to_uint8_truncated(sample: Array) -> NDArray[np.uint8]:
    """Return pixels (n, h, w, 3) of a decoded sample (n, 3, h, w) in [-1, 1], cut off as ComfyUI's SaveImage does."""
    return from_unit(to_unit(sample))


def to_unit(sample: Array) -> NDArray[np.float32]:
    """Return a decoded sample (n, 3, h, w) in [-1, 1] as pixels from 0 to 1, as ComfyUI's VAEDecode gives them."""
    # The operations and their order are ComfyUI's: a rounding before the cut decides between two pixel values.
    unit: NDArray[np.float32] = np.clip((sample.astype(np.float32) + 1.0) / 2.0, 0.0, 1.0)
    return unit


def from_unit(unit: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return pixels (n, h, w, 3) of values (n, 3, h, w) from 0 to 1, cut off as ComfyUI's SaveImage does."""
    pixels: NDArray[np.uint8] = np.clip(unit * np.float32(255.0), 0, 255).astype(np.uint8)
    return pixels.transpose(0, 2, 3, 1)
