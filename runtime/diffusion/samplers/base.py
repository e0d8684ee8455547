"""Building blocks of samplers: the steps of a grid, linear updates of latents, and noise.

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
"""`split(sigma, after)` is (down, up): denoising to `down`, then adding noise of deviation `up`, reaches `after`."""
Middle = Callable[[float, float], float]
"""`middle(sigma, after)` is the midpoint of two sigmas in log sigma; 0 if the second one is 0."""
Noise = Callable[[float, float], Latents]
"""`noise(sigma, sigma_next)` draws unit-variance noise of the latents' shape for the interval between two sigmas. A
Brownian source is consistent over overlapping intervals, an independent one is not. The sampler owns the array."""


class StochasticSampler(Protocol):
    """A sampler that adds noise at its steps."""

    def __call__(self, denoise: Denoise, x: Latents, sigmas: Sigmas, *, noise: Noise) -> Iterator[Latents]:
        """Yield the latents after every step, with noise drawn from `noise`."""
        ...


def intervals(sigmas: Sigmas) -> Iterator[tuple[float, float]]:
    """Return the steps of a grid (steps + 1,) as pairs of Python floats: coefficients are computed in double."""
    return pairwise(sigmas.tolist())


def toward(x: Latents, denoised: Latents, remaining: float) -> Latents:
    """Return denoised + remaining · (x - denoised), a new array.

    With `remaining` = sigma_next / sigma it is an Euler step, and the first-order step of every DPM-Solver++.
    """
    moved = x - denoised
    moved *= remaining
    moved += denoised
    return moved


def add_noise(x: Latents, drawn: Latents, deviation: float) -> None:
    """Add `drawn` · `deviation` to `x`, overwriting both: allocating memory costs more than the arithmetic."""
    drawn *= deviation
    x += drawn


def ancestral(sigma: float, after: float) -> tuple[float, float]:
    """Return (down, up): denoising to `down`, then adding noise of deviation `up`, reaches `after`.

    The split of DDPM (arXiv 2006.11239) in sigmas, down = after² / sigma, as in k-diffusion with eta 1.
    """
    ratio = after / sigma
    return after * ratio, after * math.sqrt(1.0 - ratio * ratio)


def geometric_mean(sigma: float, after: float) -> float:
    """Return the midpoint of two sigmas in log sigma."""
    return math.sqrt(sigma * after)
