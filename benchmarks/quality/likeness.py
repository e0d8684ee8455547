"""Similarity of two arrays: PSNR of any arrays, SSIM of pictures."""

__all__ = ["psnr", "ssim"]

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
PIXEL_RANGE = 255.0
_SIGMA, _RADIUS = 1.5, 5
_SMALL = ((0.01 * PIXEL_RANGE) ** 2, (0.03 * PIXEL_RANGE) ** 2)
"""C1 and C2 of the paper (K1 = 0.01, K2 = 0.03): they keep the quotient finite in black or uniform windows."""


def psnr(found: Array, reference: Array, peak: float | None = None) -> float | None:
    """Return the peak signal-to-noise ratio in dB of `found` against `reference`, or None if they are equal.

    `peak` is the range of possible values, by default the range of the reference (for a constant its absolute value,
    for zeros 1). The result is 0 dB if `found` holds NaN or infinity. Raises ValueError if the shapes differ.
    """
    if found.shape != reference.shape:
        raise ValueError(f"shape {found.shape} against {reference.shape}")
    exact = reference.astype(np.float64)
    if not np.isfinite(found).all():
        return 0.0
    error = float(np.mean(np.square(found.astype(np.float64) - exact)))
    if error == 0.0:
        return None
    peak = peak or float(np.ptp(exact)) or float(np.abs(exact).max()) or 1.0
    return 10.0 * math.log10(peak**2 / error)


def ssim(found: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float:
    """Return the structural similarity of two pictures (h, w, 3), at most 1.

    Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to structural similarity",
    2004: a Gaussian window of 11 pixels and sigma 1.5, averaged over all windows inside the picture and over red,
    green and blue. Equals scikit-image with `gaussian_weights` and without `use_sample_covariance`.
    Raises ValueError if the shapes differ or a side is shorter than 11 pixels.
    """
    if found.shape != reference.shape or min(found.shape[:2]) <= 2 * _RADIUS:
        raise ValueError(
            f"pictures of {found.shape} and {reference.shape}; SSIM needs equal shapes, each side 11 pixels or more"
        )
    x, y = found.astype(np.float64), reference.astype(np.float64)
    mean_x, mean_y = _smoothed(x), _smoothed(y)
    spread = _smoothed(x * x) - mean_x**2 + _smoothed(y * y) - mean_y**2
    shared = _smoothed(x * y) - mean_x * mean_y
    c1, c2 = _SMALL
    tone = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return float(np.mean(tone * (2 * shared + c2) / (spread + c2)))


def _smoothed(plane: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the Gaussian mean of every window that lies inside `plane` (h, w, c)."""
    offsets = np.arange(-_RADIUS, _RADIUS + 1)
    weights = np.exp(-0.5 * (offsets / _SIGMA) ** 2)
    weights /= weights.sum()
    high, wide = (side - 2 * _RADIUS for side in plane.shape[:2])
    rows = sum(weight * plane[start : start + high] for start, weight in enumerate(weights))
    both: NDArray[np.float64] = sum(weight * rows[:, start : start + wide] for start, weight in enumerate(weights))
    return both
