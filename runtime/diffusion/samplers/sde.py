"""Samplers that add noise, from a source that the caller passes.

`noise(sigma, sigma_next)` is called once a step, by `dpmpp_sde` twice, in the order of the steps, and not for a step to
sigma 0. Two-call samplers yield whole steps; multistep samplers restart at first order at a handoff. `split` and
`middle` compute the target and the midpoint of a step: in double, or rounded as in ComfyUI.
"""

__all__ = [
    "dpm_2_ancestral",
    "dpmpp_2m_sde",
    "dpmpp_2s_ancestral",
    "dpmpp_3m_sde",
    "dpmpp_sde",
    "euler_ancestral",
    "lcm",
]

import math

from sdxl_trt.runtime.diffusion.samplers.base import (
    Ask,
    Asking,
    Latents,
    Middle,
    Noise,
    Sigmas,
    Split,
    add_noise,
    ancestral,
    geometric_mean,
    intervals,
    toward,
)


def euler_ancestral(x: Latents, sigmas: Sigmas, *, noise: Noise, split: Split = ancestral) -> Asking:
    """Ancestral sampling (arXiv 2006.11239) with Euler steps, as in k-diffusion with eta 1."""
    for sigma, after in intervals(sigmas):
        down, up = split(sigma, after)
        x = toward(x, (yield Ask(x, sigma)), down / sigma)
        if down:
            add_noise(x, noise(sigma, after), up)
        yield x


def dpm_2_ancestral(
    x: Latents,
    sigmas: Sigmas,
    *,
    noise: Noise,
    split: Split = ancestral,
    middle: Middle = geometric_mean,
) -> Asking:
    """Ancestral sampling with the steps of DPM-Solver-2 (arXiv 2206.00927), as in k-diffusion with eta 1."""
    for sigma, after in intervals(sigmas):
        down, up = split(sigma, after)
        between = middle(sigma, down)
        reached = toward(x, (yield Ask(x, sigma)), between / sigma)
        if down:
            reached -= yield Ask(reached, between)
            reached *= (down - sigma) / between
            reached += x
            add_noise(reached, noise(sigma, after), up)
        x = reached
        yield x


def dpmpp_2s_ancestral(
    x: Latents,
    sigmas: Sigmas,
    *,
    noise: Noise,
    split: Split = ancestral,
    middle: Middle = geometric_mean,
) -> Asking:
    """Ancestral sampling with the steps of DPM-Solver++(2S) (arXiv 2211.01095), as in k-diffusion with eta 1."""
    for sigma, after in intervals(sigmas):
        down, up = split(sigma, after)
        denoised = yield Ask(x, sigma)
        if down:
            between = middle(sigma, down)
            denoised = yield Ask(toward(x, denoised, between / sigma), between)
        x = toward(x, denoised, down / sigma)
        if after:
            add_noise(x, noise(sigma, after), up)
        yield x


def dpmpp_sde(
    x: Latents,
    sigmas: Sigmas,
    *,
    noise: Noise,
    split: Split = ancestral,
    middle: Middle = geometric_mean,
) -> Asking:
    """DPM-Solver++ (stochastic) as in k-diffusion and diffusers' DPMSolverSDEScheduler, with eta 1 and r 1/2.

    `noise` is drawn for the first half of a step and for the whole step; a Brownian source makes the two consistent.
    """
    for sigma, after in intervals(sigmas):
        denoised = yield Ask(x, sigma)
        if after:
            between = middle(sigma, after)
            down, up = split(sigma, between)
            halfway = toward(x, denoised, down / sigma)
            add_noise(halfway, noise(sigma, between), up)
            denoised = yield Ask(halfway, between)
        down, up = split(sigma, after)
        x = toward(x, denoised, down / sigma)
        if after:
            add_noise(x, noise(sigma, after), up)
        yield x


def dpmpp_2m_sde(x: Latents, sigmas: Sigmas, *, noise: Noise) -> Asking:
    """DPM-Solver++(2M) SDE, the midpoint form of k-diffusion and diffusers (sde-dpmsolver++), with eta 1.

    In t = -log sigma the last two estimates are extrapolated by half a step; a step to sigma 0 is of first order.
    """
    previous, behind = x, math.inf
    for sigma, after in intervals(sigmas):
        denoised = target = yield Ask(x, sigma)
        ahead = math.log(sigma / after) if after else math.inf
        if after and 0.0 < behind < math.inf:
            target = toward(previous, denoised, -0.5 * ahead / behind)
        down, up = ancestral(sigma, after)
        x = toward(x, target, down / sigma)
        if after:
            add_noise(x, noise(sigma, after), up)
        previous, behind = denoised, ahead
        yield x


def dpmpp_3m_sde(x: Latents, sigmas: Sigmas, *, noise: Noise) -> Asking:
    """DPM-Solver++(3M) SDE of k-diffusion, with eta 1.

    diffusers' DPMSolverMultistepScheduler with solver order 3 is not the same: a constant in its third-order term has
    the opposite sign to the expansion's.
    """
    known: list[tuple[float, Latents]] = []
    for sigma, after in intervals(sigmas):
        denoised = target = yield Ask(x, sigma)
        down, up = ancestral(sigma, after)
        if 0.0 < after < sigma and known:
            target = denoised + _third_order(denoised, known, math.log(sigma / after))
        x = toward(x, target, down / sigma)
        if after:
            add_noise(x, noise(sigma, after), up)
        if 0.0 < after < sigma:
            known = [(math.log(sigma / after), denoised), *known[:1]]
        yield x


def _third_order(denoised: Latents, known: list[tuple[float, Latents]], ahead: float) -> Latents:
    """Return the change of the estimate over a step of `ahead` in t, weighted by the step's exponential.

    `known` holds up to two earlier estimates, the newest first, each with the length of the step after it.
    """
    weight = -math.expm1(-2.0 * ahead)
    phi_2 = 1.0 - weight / (2.0 * ahead)
    phi_3 = phi_2 / (2.0 * ahead) - 0.5
    (behind, previous), *older = known
    newest = (denoised - previous) * (ahead / behind)
    if not older:
        return newest * (phi_2 / weight)
    ((further, oldest),) = older
    share = (phi_2 * behind - phi_3 * ahead) / (behind + further)
    newest *= (phi_2 + share) / weight
    newest -= (previous - oldest) * (share * ahead / (further * weight))
    return newest


def lcm(x: Latents, sigmas: Sigmas, *, noise: Noise) -> Asking:
    """Multistep consistency sampling (algorithm 3 of arXiv 2310.04378): the model's estimate with new noise.

    diffusers' LCMScheduler also mixes in (0.5 / 10 t)² of the noisy latents; at most 7e-6 on its grid, it is left out.
    """
    for sigma, after in intervals(sigmas):
        x = yield Ask(x, sigma)
        if after:
            drawn = noise(sigma, after)
            drawn *= after
            drawn += x
            x = drawn
        yield x
