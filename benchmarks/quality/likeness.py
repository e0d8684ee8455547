"""How like two arrays are: PSNR of anything, SSIM of pictures."""

__all__ = ["psnr", "ssim"]

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
PIXEL_RANGE = 255.0
_SIGMA, _RADIUS = 1.5, 5
_SMALL = ((0.01 * PIXEL_RANGE) ** 2, (0.03 * PIXEL_RANGE) ** 2)
"""K1, K2 of the paper: what keeps the quotient finite where a window is black, or of one tone."""


def psnr(found: Array, reference: Array, peak: float | None = None) -> float | None:
    """Return the peak signal-to-noise ratio in dB of `found` against a `reference` of its shape; None where equal.

    `peak` is the range that a value can have, by default the range of those in the reference (of a constant its
    size, and 1 for zeros). Where `found` holds NaN or infinity there is no likeness: 0 dB. Raises ValueError where the
    shapes differ.
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
    """Return the structural similarity of two pictures (h, w, 3), at most 1; sides of 11 pixels at least.

    Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to structural similarity",
    2004: a Gaussian window of 11 pixels and sigma 1.5, the mean over all windows that lie within the picture, and
    over red, green and blue. So does scikit-image with `gaussian_weights` and without `use_sample_covariance`.
    Raises ValueError where the shapes differ, or a side is shorter than the window.
    """
    if found.shape != reference.shape or min(found.shape[:2]) <= 2 * _RADIUS:
        raise ValueError(
            f"pictures of {found.shape} and {reference.shape}; SSIM takes equal ones, of 11 pixels or more"
        )
    x, y = found.astype(np.float64), reference.astype(np.float64)
    mean_x, mean_y = _smoothed(x), _smoothed(y)
    spread = _smoothed(x * x) - mean_x**2 + _smoothed(y * y) - mean_y**2
    shared = _smoothed(x * y) - mean_x * mean_y
    c1, c2 = _SMALL
    tone = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return float(np.mean(tone * (2 * shared + c2) / (spread + c2)))


def _smoothed(plane: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the Gaussian means of all windows that lie within (h, w, c)."""
    offsets = np.arange(-_RADIUS, _RADIUS + 1)
    weights = np.exp(-0.5 * (offsets / _SIGMA) ** 2)
    weights /= weights.sum()
    high, wide = (side - 2 * _RADIUS for side in plane.shape[:2])
    rows = sum(weight * plane[start : start + high] for start, weight in enumerate(weights))
    both: NDArray[np.float64] = sum(weight * rows[:, start : start + wide] for start, weight in enumerate(weights))
    return both
