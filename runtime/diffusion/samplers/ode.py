"""Deterministic samplers of the probability flow ODE.

Heun and DPM-Solver-2 ask the model a second time within a step, at its end or in its middle. They yield whole steps,
so a grid is always cut between steps; diffusers lists both calls as steps and can cut a step in two.
"""

__all__ = ["ddim", "dpm_2", "dpmpp_2m", "euler", "heun", "res_multistep"]

import math
from collections.abc import Callable

from sdxl_trt.runtime.diffusion.samplers.base import (
    Ask,
    Asking,
    Latents,
    Middle,
    Sigmas,
    geometric_mean,
    intervals,
    toward,
)


def euler(x: Latents, sigmas: Sigmas) -> Asking:
    """Euler steps along the probability flow ODE (algorithm 2 of arXiv 2206.00364, without churn).

    The start `x` is (n, c, h, w); `sigmas` are (steps + 1,), falling.
    """
    for sigma, after in intervals(sigmas):
        x = toward(x, (yield Ask(x, sigma)), after / sigma)
        yield x


def ddim(x: Latents, sigmas: Sigmas) -> Asking:
    """DDIM with eta 0 (arXiv 2010.02502), which in sigmas is Euler's step: only diffusers' grid for it differs.

    diffusers steps to the timestep T // steps lower. That is the next timestep of its grid with `leading`, and with
    `trailing` if the steps divide T; otherwise the noise level of its latents differs from the timestep that it passes
    to the model. Here both always agree.
    """
    return euler(x, sigmas)


def heun(x: Latents, sigmas: Sigmas) -> Asking:
    """Heun steps (algorithm 2 of arXiv 2206.00364, without churn): the mean of the slopes at both ends of a step."""
    for sigma, after in intervals(sigmas):
        denoised = yield Ask(x, sigma)
        slope = x - denoised
        reached = slope * (after / sigma)
        reached += denoised
        if after:
            half = 0.5 * (after - sigma)
            reached -= yield Ask(reached, after)
            reached *= half / after
            slope *= half / sigma
            reached += slope
            reached += x
        x = reached
        yield x


def dpm_2(x: Latents, sigmas: Sigmas, *, middle: Middle = geometric_mean) -> Asking:
    """DPM-Solver-2 (arXiv 2206.00927) as in k-diffusion: the slope at the `middle` of a step in log sigma."""
    for sigma, after in intervals(sigmas):
        between = middle(sigma, after)
        halfway = toward(x, (yield Ask(x, sigma)), between / sigma)
        if after:
            halfway -= yield Ask(halfway, between)
            halfway *= (after - sigma) / between
            halfway += x
        x = halfway
        yield x


def dpmpp_2m(x: Latents, sigmas: Sigmas) -> Asking:
    """DPM-Solver++(2M) (algorithm 2 of arXiv 2211.01095), the midpoint form of k-diffusion and diffusers.

    In t = -log sigma the last two estimates are extrapolated by half a step; a step to sigma 0 is of first order.
    """
    return _extrapolated(x, sigmas, _midpoint)


def res_multistep(x: Latents, sigmas: Sigmas) -> Asking:
    """The second-order multistep refined exponential solver (arXiv 2308.02157) as in ComfyUI, without noise.

    The line through the last two estimates is integrated exactly against the exponential of the step.
    """
    return _extrapolated(x, sigmas, _mean)


def _midpoint(ahead: float) -> float:
    return 0.5 * ahead


def _mean(ahead: float) -> float:
    """Return the mean of t over a step of length `ahead`, weighted by exp(t), as the step weights the estimate."""
    return -ahead / math.expm1(-ahead) - 1.0


def _extrapolated(x: Latents, sigmas: Sigmas, reach: Callable[[float], float]) -> Asking:
    """Step toward the last two estimates, extrapolated to `reach(step)` from here in t = -log sigma."""
    previous, behind = x, math.inf
    for sigma, after in intervals(sigmas):
        denoised = target = yield Ask(x, sigma)
        remaining = after / sigma
        ahead = -math.log(remaining) if after else math.inf
        if 0.0 < remaining < 1.0 and 0.0 < behind < math.inf:
            target = toward(previous, denoised, -reach(ahead) / behind)
        x = toward(x, target, remaining)
        previous, behind = denoised, ahead
        yield x
