"""How close results must be: limits for whole pictures, single calls, and repetitions of the same plan.

A whole picture shows that the right bytes are in the right place at the right time; a single call shows whether a
kernel computes what it should. So the limits of single calls are narrow, and those of whole pictures wide.

Whole pictures of the embedded pair have the limits of `trt-bench --quality`, which were measured on that pair: 20 dB
below what fp16 reaches on a CPU. Nothing was measured at SDXL's depth. Its UNets round some ten times as often and
GPUs sum in half precision in some kernels, so there the limits are those that docs/quality.md gives bf16, which rounds
8 times as coarsely as fp16, or those of 8 bits if a component has them. A cosine follows from a PSNR: latents span
about 8 standard deviations, so an error of `psnr` dB is 8 · 10^(-psnr/20) of their root mean square e, and the cosine
is 1 - e²/2.
"""

__all__ = ["CALL_COSINE", "EIGHT_BIT_COSINE", "EQUAL", "Limits", "cosine", "decibels", "limits_of", "same"]

from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.benchmarks.quality import limit_of, psnr
from sdxl_trt.engines.bundle import Precision

Array = NDArray[Any]
CALL_COSINE = 1 - 1e-4
"""The lowest cosine of one call in fp16 against ONNX Runtime: that of export-engines --verify and trt-inspect.

PyTorch's fp16 on a CPU has 0.999995 for a UNet of SDXL's depth with random weights: docs/gpu.md.
"""
EIGHT_BIT_COSINE = 1 - 4e-3
"""The lowest cosine of one call in 8 bits against the same one in fp16: 42 dB on a CPU, and a margin of 3 dB."""
_SPAN = 8.0
_SAME = 1e-3
EQUAL = 999.0
"""The decibels of equal arrays, which have no finite PSNR."""


@dataclass(frozen=True)
class Limits:
    """The least PSNR in dB of final latents and of decoded pixels, and the least cosine of the latents."""

    latents: float
    pixels: float

    @property
    def cosine(self) -> float:
        """Return the least cosine of the latents, which follows from their PSNR."""
        error = _SPAN * 10 ** (-self.latents / 20)
        return 1 - float(error**2) / 2


def limits_of(precisions: AbstractSet[Precision], *, deep: bool) -> Limits:
    """Return the limits of whole pictures for components of these `precisions`; `deep` for models of SDXL's depth."""
    least: Precision = "bf16" if deep else "fp16"
    coarsest: set[Precision] = {least, *precisions}
    return Limits(limit_of("final latents", coarsest), limit_of("pixels", coarsest))


def cosine(found: Array, reference: Array) -> float:
    """Return the cosine of two arrays of one shape, in double precision; 0 if one holds NaN or infinity."""
    a, b = found.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return 0.0
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms else float(bool((a == b).all()))


def decibels(found: Array, reference: Array) -> float:
    """Return the PSNR of `found` in dB, at most EQUAL, which stands for equal arrays."""
    value = psnr(found, reference)
    return EQUAL if value is None else min(value, EQUAL)


def same(found: Array, reference: Array) -> tuple[bool, str]:
    """Return whether two runs of the same kernels agree to 1/1000 of the reference's range, and their difference."""
    if found.shape != reference.shape or not np.isfinite(found).all():
        return False, "not finite, or of another shape"
    a, b = found.astype(np.float64), reference.astype(np.float64)
    difference = float(np.abs(a - b).max())
    allowed = _SAME * (float(np.ptp(b)) or float(np.abs(b).max()))
    return difference <= allowed, "equal bit for bit" if difference == 0 else f"a difference of {difference:.1e}"
