"""How far two results differ, and how far they may differ.

Every difference is relative to the range of the reference: an error of 0.01 is negligible in a hidden state that
spans 200, but large in latents that span 6. Cosine alone misses a wrong scale, the largest error alone misses a
small error everywhere, so all three limits must hold. PyTorch's own fp16 shows the cost of fp16: a graph more than
EXCESS times as far from fp32 as PyTorch's fp16 has an error other than rounding.
"""

__all__ = ["EXCESS", "Figures", "Tolerance", "excess", "limits_of", "measure"]

from typing import Literal

import msgspec
import numpy as np

from sdxl_trt.engines import Array

Pair = Literal["graph", "precision"]
EXCESS = 1.5
# If PyTorch happens to round nothing, half a unit in the last place of fp16 is still allowed.
_ROUNDING = 2.0**-12


class Figures(msgspec.Struct, frozen=True, omit_defaults=True):
    """One output against its reference: `peak` is the reference's range, `psnr` (dB) is None if both are equal."""

    output: str
    peak: float
    max_abs: float
    cosine: float
    psnr: float | None = None
    finite: bool = True

    @property
    def relative(self) -> float:
        """Return the largest error divided by the reference's range."""
        return self.max_abs / self.peak

    @property
    def rank(self) -> float:
        """Return a number that is smaller the larger the error is."""
        if not self.finite:
            return -np.inf
        return np.inf if self.psnr is None else self.psnr


class Tolerance(msgspec.Struct, frozen=True):
    """Limits for a pass: `relative` is the largest error divided by the reference's range."""

    relative: float
    cosine: float
    psnr: float

    def problem(self, figures: Figures) -> str:
        """Return the figure beyond its limit, with both numbers; "" if there is none."""
        if not figures.finite:
            return "NaN or infinity"
        if not figures.relative <= self.relative:
            return f"largest error {figures.relative:.2g} of the range, {self.relative:.2g} allowed"
        if not figures.cosine >= self.cosine:
            return f"cosine {figures.cosine:.9f}, {self.cosine:.9f} required"
        if figures.psnr is not None and not figures.psnr >= self.psnr:
            return f"PSNR {figures.psnr:.1f} dB, {self.psnr:.1f} dB required"
        return ""


# Measured on trained and untrained miniatures, the worst call of each: fp32 137 dB, 5e-7 of the range, cosine 1 to
# nine digits; fp16 graph 74 dB and 1.6e-3, its cost 78 dB and 7e-4, cosines from 1 - 3e-7; bf16 54 dB, 1 - 3e-5.
# Models of SDXL's depth round many times more often, hence the margin. Within it, EXCESS (at most 0.93 measured)
# separates rounding from other errors: a transposed attention weight in the trained miniature still gives 58 dB, but
# is 14 times too far. 8 bits, the worst call of an untrained UNet: int8 28 dB, 0.17 of the range, cosine 0.957; FP8
# 35 dB, 0.08, 0.993; the trained one's int8 56 dB, its decoder's 47 dB. So wide a limit finds little: EXCESS (at most
# 1.15 measured in 8 bits) and the look at each layer (layers.py) find what it misses.
_LIMITS: dict[tuple[str, Pair], Tolerance] = {
    ("fp32", "graph"): Tolerance(relative=1e-4, cosine=1 - 1e-8, psnr=100.0),
    ("fp16", "graph"): Tolerance(relative=2e-2, cosine=1 - 1e-5, psnr=55.0),
    ("fp16", "precision"): Tolerance(relative=3e-2, cosine=1 - 1e-4, psnr=45.0),
    ("bf16", "precision"): Tolerance(relative=1e-1, cosine=1 - 2e-3, psnr=32.0),
    ("int8", "precision"): Tolerance(relative=3e-1, cosine=1 - 8e-2, psnr=24.0),
    ("fp8", "precision"): Tolerance(relative=3e-1, cosine=1 - 8e-2, psnr=24.0),
}


def limits_of(precision: str, pair: Pair) -> Tolerance:
    """Return the limits of a precision; "mixed" has those of fp16."""
    known = precision if (precision, pair) in _LIMITS else "fp16"
    return _LIMITS[known, pair]


def measure(output: str, found: Array, reference: Array) -> Figures:
    """Compare two arrays of one shape in double precision."""
    a, b = (np.asarray(array, dtype=np.float64).ravel() for array in (found, reference))
    peak = _peak(b)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Figures(output, peak=1.0, max_abs=0.0, cosine=0.0, finite=False)
    error = _rms(a - b)
    psnr = None if error == 0 else float(20 * np.log10(peak / error))
    return Figures(output, peak, float(np.abs(a - b).max()), _cosine(a, b), psnr)


def excess(found: Array, rounded: Array, reference: Array) -> float:
    """Return the RMS distance of `found` to `reference` over that of `rounded`, PyTorch's own rounding."""
    a, b, c = (np.asarray(array, dtype=np.float64) for array in (found, rounded, reference))
    return float(_rms(a - c) / max(_rms(b - c), _ROUNDING * _rms(c), np.finfo(np.float64).tiny))


def _peak(reference: Array) -> float:
    """Return the range; for a constant its absolute value, or 1 if that is 0."""
    return float(np.ptp(reference) or np.abs(reference).max() or 1.0)


def _rms(values: Array) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _cosine(a: Array, b: Array) -> float:
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    if norms == 0:
        return 1.0 if np.array_equal(a, b) else 0.0
    return min(float(a @ b) / norms, 1.0)
