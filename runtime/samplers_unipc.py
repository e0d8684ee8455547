"""UniPC (arXiv 2302.04867): a multistep predictor, and a corrector that costs no further call of the model.

The estimate that the next step needs anyway also corrects the step before it. Latents are yielded as predicted, as
diffusers' scheduler returns them; a grid that is cut restarts at the cut by construction.
"""

__all__ = ["uni_pc", "uni_pc_bh1_comfyui", "uni_pc_bh2_comfyui"]

import math
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Literal

import numpy as np

from sdxl_trt.runtime.sampler_parts import Denoise, Latents, Sigmas, intervals, toward

Variant = Literal["bh1", "bh2"]
Estimate = tuple[float, Latents]
"""log sigma and the clean latents that were estimated there."""

COMFYUI_END = 0.001
"""ComfyUI's stand-in for sigma 0."""


def uni_pc(denoise: Denoise, x: Latents, sigmas: Sigmas) -> Iterator[Latents]:
    """UniPC of order 2 with B(h) = exp(h) - 1 (bh2), the default of diffusers' UniPCMultistepScheduler."""
    ends = len(sigmas) > 0 and sigmas[-1] == 0.0
    return _uni_pc(denoise, x, sigmas, order=2, variant="bh2", ends=ends)


def uni_pc_bh1_comfyui(denoise: Denoise, x: Latents, sigmas: Sigmas) -> Iterator[Latents]:
    """UniPC of order 3 with B(h) = h as ComfyUI's ``uni_pc``: it stops at sigma 0.001."""
    return _comfyui(denoise, x, sigmas, "bh1")


def uni_pc_bh2_comfyui(denoise: Denoise, x: Latents, sigmas: Sigmas) -> Iterator[Latents]:
    """UniPC of order 3 with B(h) = exp(h) - 1 as ComfyUI's ``uni_pc_bh2``: it stops at sigma 0.001."""
    return _comfyui(denoise, x, sigmas, "bh2")


def _comfyui(denoise: Denoise, x: Latents, sigmas: Sigmas, variant: Variant) -> Iterator[Latents]:
    moved = np.where(sigmas == 0.0, np.float32(COMFYUI_END), sigmas)
    return _uni_pc(denoise, x, moved, order=max(min(3, len(sigmas) - 2), 1), variant=variant, ends=True)


def _uni_pc(
    denoise: Denoise, x: Latents, sigmas: Sigmas, *, order: int, variant: Variant, ends: bool
) -> Iterator[Latents]:
    """Predict, and correct as soon as the model is asked again; where a run `ends`, so do the higher orders."""
    steps, used, start = len(sigmas) - 1, 0, x
    known: deque[Estimate] = deque(maxlen=order)
    for index, (sigma, after) in enumerate(intervals(sigmas)):
        denoised = denoise(x, sigma)
        if known:
            x = _step(start, [*islice(known, used)], sigma, variant, reached=denoised)
        known.appendleft((math.log(sigma), denoised))
        used = min(len(known), order, steps - index if ends else order)
        start = x
        x = x if after == sigma else _step(start, [*islice(known, used)], after, variant)
        yield x


def _step(
    x: Latents, known: Sequence[Estimate], after: float, variant: Variant, reached: Latents | None = None
) -> Latents:
    """Go from `known[0]`'s sigma to `after`; `reached` is the estimate there, which makes it the corrector's step."""
    (log_sigma, denoised), *older = known
    step = math.log(after) - log_sigma if after else -math.inf
    places = [(log - log_sigma) / step for log, _ in older]
    estimates = [estimate for _, estimate in older]
    if reached is not None:
        places.append(1.0)
        estimates.append(reached)
    moved = toward(x, denoised, math.exp(step))
    scale = step if variant == "bh1" else math.expm1(step)
    for weight, place, estimate in zip(_weights(places, step, scale), places, estimates, strict=True):
        difference = estimate - denoised
        difference *= scale * weight / place
        moved -= difference
    return moved


def _weights(places: Sequence[float], step: float, scale: float) -> list[float]:
    """Return the weights of the estimates at `places`, in units of the step from its start (equations 9 and 10)."""
    if len(places) <= 1:
        return [0.5] * len(places)
    targets, phi, factorial = [], math.expm1(step) / step - 1.0, 1.0
    for row in range(1, len(places) + 1):
        targets.append(phi * factorial / scale)
        factorial *= row + 1
        phi = phi / step - 1.0 / factorial
    powers = np.vander(places, increasing=True).T
    return [float(weight) for weight in np.linalg.solve(powers, targets)]
