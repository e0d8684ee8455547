"""Classifier-free guidance: how far from the negative prompt, at which steps, and how much of it is taken back."""

__all__ = ["Guidance", "guided_span", "guides"]

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines import UsageError


def guides(scale: float, *, comfyui_rule: bool = False) -> bool:
    """Return whether `scale` is guidance: above 1 (diffusers' rule), or with `comfyui_rule` all but 1 (ComfyUI's)."""
    return not math.isclose(scale, 1.0) if comfyui_rule else scale > 1.0


@dataclass(frozen=True)
class Guidance:
    """How strongly a stage is guided. Sigmas in (`above`, `up_to`] are; the others run the positive prompt alone, in
    half the rows. `rescale` mixes in a prediction with the positive's own spread; `comfyui_rule` is that of `guides`.
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

        It takes the place of the positive, and the negative is lost (arXiv 2207.12598). With `rescale`, as section 3.4
        of arXiv 2305.08891 and diffusers' ``rescale_noise_cfg``.
        """
        axes = tuple(range(1, positive.ndim))
        spread = positive.std(axis=axes, keepdims=True) if self.rescale else None
        # negative + scale · (positive - negative), in as few passes as numpy can have
        positive *= np.float32(self.scale * factor)
        negative *= np.float32((1.0 - self.scale) * factor)
        positive += negative
        if spread is not None:
            ratio = abs(factor) * spread / positive.std(axis=axes, keepdims=True)
            positive *= 1 - np.float32(self.rescale) + np.float32(self.rescale) * ratio
        return positive


def guided_span(sigmas: NDArray[np.float32], first: float, last: float) -> tuple[float, float]:
    """Return (above, up_to) for guidance from the fraction `first` of the steps up to `last`, of (steps + 1,) sigmas.

    Step i of n is guided where first <= i / n < last. Raises UsageError unless 0 <= first <= last <= 1.
    """
    if not 0.0 <= first <= last <= 1.0:
        raise UsageError(f"--guidance-interval {first:g}:{last:g}: give two fractions of the steps in rising order")
    steps = len(sigmas) - 1
    # A fraction that was meant to fall on a step must not miss it by a rounding.
    begin, end = (math.ceil(round(share * steps, 9)) for share in (first, last))
    if begin >= end:
        return 0.0, 0.0
    return float(sigmas[end]) if end < steps else 0.0, math.inf if begin == 0 else float(sigmas[begin])
