"""Classifier-free guidance: its scale, the steps that it applies to, and the rescaling of its result."""

__all__ = ["Guidance", "guided_span", "guides"]

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines import UsageError


def guides(scale: float, *, comfyui_rule: bool = False) -> bool:
    """Return whether `scale` guides: above 1 (diffusers' rule), or with `comfyui_rule` any but 1 (ComfyUI's)."""
    return not math.isclose(scale, 1.0) if comfyui_rule else scale > 1.0


@dataclass(frozen=True)
class Guidance:
    """The guidance of a stage. Sigmas in (`above`, `up_to`] are guided; the others run the positive prompt alone, in
    half the rows. `rescale` is the share of a result rescaled to the positive's spread; `comfyui_rule`: see `guides`.
    """

    scale: float
    rescale: float = 0.0
    above: float = 0.0
    up_to: float = math.inf
    comfyui_rule: bool = False

    @property
    def wanted(self) -> bool:
        """Return whether any step is guided."""
        return guides(self.scale, comfyui_rule=self.comfyui_rule) and self.above < self.up_to

    def applies(self, sigma: float) -> bool:
        """Return whether a step at `sigma` is guided."""
        return self.wanted and self.above < sigma <= self.up_to

    def combine(
        self, positive: NDArray[np.float32], negative: NDArray[np.float32], factor: float = 1.0
    ) -> NDArray[np.float32]:
        """Return `factor` times the guided prediction (n, c, h, w): away from the negative, through the positive.

        It overwrites `positive` and also `negative` (arXiv 2207.12598). `rescale` is as in section 3.4 of arXiv
        2305.08891 and diffusers' ``rescale_noise_cfg``.
        """
        axes = tuple(range(1, positive.ndim))
        spread = positive.std(axis=axes, keepdims=True) if self.rescale else None
        # negative + scale · (positive - negative), in as few passes as numpy allows
        positive *= np.float32(self.scale * factor)
        negative *= np.float32((1.0 - self.scale) * factor)
        positive += negative
        if spread is not None:
            ratio = abs(factor) * spread / positive.std(axis=axes, keepdims=True)
            positive *= 1 - np.float32(self.rescale) + np.float32(self.rescale) * ratio
        return positive


def guided_span(sigmas: NDArray[np.float32], first: float, last: float) -> tuple[float, float]:
    """Return (above, up_to) for guidance from fraction `first` to fraction `last` of the steps of (steps + 1,) sigmas.

    Step i of n is guided if first <= i / n < last. Raises UsageError unless 0 <= first <= last <= 1.
    """
    if not 0.0 <= first <= last <= 1.0:
        raise UsageError(f"--guidance-interval {first:g}:{last:g}: give two fractions of the steps in rising order")
    steps = len(sigmas) - 1
    # A fraction that is meant to fall on a step must not miss it because of rounding.
    begin, end = (math.ceil(round(share * steps, 9)) for share in (first, last))
    if begin >= end:
        return 0.0, 0.0
    return float(sigmas[end]) if end < steps else 0.0, math.inf if begin == 0 else float(sigmas[begin])
