"""UniPC (arXiv 2302.04867): a multistep predictor, and a corrector that needs no extra call of the model.

The model's estimate for the next step also corrects the step before it. Like diffusers' scheduler, it yields the
predicted latents; a run that starts at a handoff begins at first order.
"""

__all__ = ["uni_pc", "uni_pc_bh1_comfyui", "uni_pc_bh2_comfyui"]

import math
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Literal

import numpy as np

from sdxl_trt.runtime.diffusion.samplers.base import Ask, Asking, Latents, Sigmas, intervals, toward
from sdxl_trt.runtime.float32 import exp32, log32

Variant = Literal["bh1", "bh2"]
Estimate = tuple[float, Latents]
"""log sigma and the clean latents estimated there."""

COMFYUI_END = 0.001
"""ComfyUI's replacement for sigma 0."""


def uni_pc(x: Latents, sigmas: Sigmas) -> Asking:
    """UniPC of order 2 with B(h) = exp(h) - 1 (bh2), the default of diffusers' UniPCMultistepScheduler."""
    ends = len(sigmas) > 0 and sigmas[-1] == 0.0
    return _uni_pc(x, sigmas, order=2, variant="bh2", ends=ends)


def uni_pc_bh1_comfyui(x: Latents, sigmas: Sigmas) -> Asking:
    """UniPC of order 3 with B(h) = h as ComfyUI's ``uni_pc``: it stops at sigma 0.001.

    As in ComfyUI, a single step leaves the latents as they are.
    """
    return _comfyui(x, sigmas, "bh1")


def uni_pc_bh2_comfyui(x: Latents, sigmas: Sigmas) -> Asking:
    """UniPC of order 3 with B(h) = exp(h) - 1 as ComfyUI's ``uni_pc_bh2``: it stops at sigma 0.001.

    As in ComfyUI, a single step leaves the latents as they are.
    """
    return _comfyui(x, sigmas, "bh2")


def _comfyui(x: Latents, sigmas: Sigmas, variant: Variant) -> Asking:
    moved = np.where(sigmas == 0.0, np.float32(COMFYUI_END), sigmas)
    order = min(3, len(sigmas) - 2)
    if order < 1:
        return _unmoved(x, moved)
    return _uni_pc(x, moved, order=order, variant=variant, ends=True, log=_log_sigma_comfyui)


def _unmoved(x: Latents, sigmas: Sigmas) -> Asking:
    """Yield ComfyUI's result of a single step: unchanged latents in the scale of the step's end."""
    for sigma, after in intervals(sigmas):
        yield Ask(x, sigma)
        yield x * np.float32(math.sqrt((1.0 + after**2) / (1.0 + sigma**2)))


def _log_sigma_comfyui(sigma: float) -> float:
    """Return log sigma from alpha and 1 - alpha² in float32, which keeps only a digit or two if sigma is small."""
    half = np.float32(0.5)
    log_alpha = half * log32(np.float32(1.0) / (np.float32(sigma) ** 2 + np.float32(1.0)))
    variance = np.float32(1.0) - exp32(np.float32(2.0) * log_alpha)
    return float(half * log32(variance) - log_alpha)


def _uni_pc(
    x: Latents,
    sigmas: Sigmas,
    *,
    order: int,
    variant: Variant,
    ends: bool,
    log: Callable[[float], float] = math.log,
) -> Asking:
    """Predict each step, and correct it after the next call of the model; with `ends`, the last orders fall."""
    # A step is corrected from its start, and the caller may write to its own latents between two steps.
    start = x = x.copy()
    steps, used = len(sigmas) - 1, 0
    known: deque[Estimate] = deque(maxlen=order)
    for index, (sigma, after) in enumerate(intervals(sigmas)):
        denoised = yield Ask(x, sigma)
        place = log(sigma)
        if known:
            x = _step(start, [*islice(known, used)], place, variant, reached=denoised)
        known.appendleft((place, denoised))
        used = min(len(known), order, steps - index if ends else order)
        start = x
        if after != sigma:
            x = _step(start, [*islice(known, used)], log(after) if after else -math.inf, variant)
        yield x


def _step(
    x: Latents, known: Sequence[Estimate], after: float, variant: Variant, reached: Latents | None = None
) -> Latents:
    """Return `x` moved from `known[0]`'s log sigma to `after`; with `reached`, the estimate there, corrected by it."""
    (log_sigma, denoised), *older = known
    step = after - log_sigma
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
