"""Samplers of the probability flow ODE that remember the last estimate of the clean latents.

Each of them starts with a first-order step, so a grid that is cut restarts at the cut by construction.
"""

__all__ = ["dpmpp_2m", "res_multistep"]

import math
from collections.abc import Callable, Iterator

from sdxl_trt.runtime.sampler_parts import Denoise, Latents, Sigmas, intervals, toward


def dpmpp_2m(denoise: Denoise, x: Latents, sigmas: Sigmas) -> Iterator[Latents]:
    """DPM-Solver++(2M) (algorithm 2 of arXiv 2211.01095), the midpoint form of k-diffusion and diffusers.

    In t = -log sigma the last two estimates are drawn on by half a step; a step to sigma 0 is of first order.
    """
    return _extrapolated(denoise, x, sigmas, _midpoint)


def res_multistep(denoise: Denoise, x: Latents, sigmas: Sigmas) -> Iterator[Latents]:
    """The second-order multistep refined exponential solver (arXiv 2308.02157) as in ComfyUI, without noise.

    The line through the last two estimates is integrated exactly against the exponential of the step.
    """
    return _extrapolated(denoise, x, sigmas, _mean)


def _midpoint(ahead: float) -> float:
    return 0.5 * ahead


def _mean(ahead: float) -> float:
    """Return the mean of t over a step of length `ahead`, weighted as the step weighs the model: with exp(t)."""
    return -ahead / math.expm1(-ahead) - 1.0


def _extrapolated(denoise: Denoise, x: Latents, sigmas: Sigmas, reach: Callable[[float], float]) -> Iterator[Latents]:
    """Step toward what the line through the last two estimates is at `reach(step)` from here in t = -log sigma."""
    previous, behind = x, math.inf
    for sigma, after in intervals(sigmas):
        denoised = target = denoise(x, sigma)
        remaining = after / sigma
        ahead = -math.log(remaining) if after else math.inf
        if 0.0 < remaining < 1.0 and 0.0 < behind < math.inf:
            target = toward(previous, denoised, -reach(ahead) / behind)
        x = toward(x, target, remaining)
        previous, behind = denoised, ahead
        yield x
