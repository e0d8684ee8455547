"""What samplers are made of: the intervals of a grid, and latents moved along them by weights.

Latents are in the variance-exploding scale of k-diffusion, clean + sigma · noise. diffusers' variance-preserving
schedulers (DDIM, DPM-Solver, UniPC, DEIS, LCM) keep the same latents divided by sqrt(1 + sigma²).
"""

__all__ = [
    "Denoise",
    "Latents",
    "Middle",
    "Noise",
    "Sampler",
    "Sigmas",
    "Split",
    "StochasticSampler",
    "add_noise",
    "ancestral",
    "geometric_mean",
    "intervals",
    "toward",
]

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Latents = NDArray[np.float32]
Sigmas = NDArray[np.float32]
Denoise = Callable[[Latents, float], Latents]
Sampler = Callable[[Denoise, Latents, Sigmas], Iterator[Latents]]
Split = Callable[[float, float], tuple[float, float]]
"""`split(sigma, after)` is (down, up): denoise to `down`, then add noise of deviation `up`, and `after` is reached."""
Middle = Callable[[float, float], float]
"""`middle(sigma, after)` is the sigma half-way between two on a line of logarithms; 0 where the second one is."""
Noise = Callable[[float, float], Latents]
"""`noise(sigma, sigma_next)` draws unit-variance noise of the latents' shape for the way between two sigmas; a
Brownian source makes the noise of overlapping ways agree, an independent one draws afresh. The array is the sampler's
to change."""


class StochasticSampler(Protocol):
    """A sampler that adds noise on its way."""

    def __call__(self, denoise: Denoise, x: Latents, sigmas: Sigmas, *, noise: Noise) -> Iterator[Latents]:
        """Yield the latents after every step, having drawn from `noise`."""
        ...


def intervals(sigmas: Sigmas) -> Iterator[tuple[float, float]]:
    """Return the steps of a grid (steps + 1,) as pairs of Python floats: coefficients are taken in double."""
    return pairwise(sigmas.tolist())


def toward(x: Latents, denoised: Latents, remaining: float) -> Latents:
    """Return a new array on the line from `denoised` (`remaining` 0) to `x` (`remaining` 1).

    With `remaining` = sigma_next / sigma it is an Euler step, and the first-order step of every DPM-Solver++.
    """
    moved = x - denoised
    moved *= remaining
    moved += denoised
    return moved


def add_noise(x: Latents, drawn: Latents, deviation: float) -> None:
    """Add `drawn` to `x` with a standard deviation, both in place: fresh memory costs more than the arithmetic."""
    drawn *= deviation
    x += drawn


def ancestral(sigma: float, after: float) -> tuple[float, float]:
    """Return (down, up): denoise to `down`, then add noise of deviation `up`, and `after` is reached.

    The split of DDPM (arXiv 2006.11239) in sigmas, down = after² / sigma, as in k-diffusion with eta 1.
    """
    ratio = after / sigma
    return after * ratio, after * math.sqrt(1.0 - ratio * ratio)


def geometric_mean(sigma: float, after: float) -> float:
    """Return the middle of two sigmas on a line of logarithms."""
    return math.sqrt(sigma * after)
