"""Building blocks of samplers: the steps of a grid, linear updates of latents, and noise.

Latents are in the variance-exploding scale of k-diffusion, clean + sigma · noise. diffusers' variance-preserving
schedulers (DDIM, DPM-Solver, UniPC, DEIS, LCM) keep the same latents divided by sqrt(1 + sigma²).

A sampler does not call the model: it yields an `Ask`, and is sent the answer. So whoever drives it decides which engine
call the rows go into, and the rows of several requests can share one.
"""

__all__ = [
    "Ask",
    "Asking",
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
    "drive",
    "geometric_mean",
    "intervals",
    "toward",
]

import math
from collections.abc import Callable, Generator, Iterator
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Latents = NDArray[np.float32]
Sigmas = NDArray[np.float32]


class Ask(NamedTuple):
    """A sampler's question: which clean latents are in `x` (n, c, h, w), with noise of deviation `sigma`?

    The answer has the shape of `x`, float32, and belongs to the sampler; `x` is not written to before it is sent.
    """

    x: Latents
    sigma: float


Asking = Generator[Ask | Latents, Latents, None]
"""A sampler at work: it yields an `Ask` and is sent the answer, or yields the latents after a step and goes on with
`next`. Each step asks at least once, and its latents follow the last answer."""
Denoise = Callable[[Latents, float], Latents]
"""`denoise(x, sigma)` answers an `Ask`."""
Sampler = Callable[[Latents, Sigmas], Asking]
Split = Callable[[float, float], tuple[float, float]]
"""`split(sigma, after)` is (down, up): denoising to `down`, then adding noise of deviation `up`, reaches `after`."""
Middle = Callable[[float, float], float]
"""`middle(sigma, after)` is the midpoint of two sigmas in log sigma; 0 if the second one is 0."""
Noise = Callable[[float, float], Latents]
"""`noise(sigma, sigma_next)` draws unit-variance noise of the latents' shape for the interval between two sigmas. A
Brownian source is consistent over overlapping intervals, an independent one is not. The sampler owns the array."""


class StochasticSampler(Protocol):
    """A sampler that adds noise at its steps."""

    def __call__(self, x: Latents, sigmas: Sigmas, *, noise: Noise) -> Asking:
        """Yield the latents after every step, with noise drawn from `noise`."""
        ...


def drive(asking: Asking, denoise: Denoise) -> Iterator[Latents]:
    """Yield the latents after every step of a sampler whose questions `denoise` answers."""
    said = next(asking, None)
    while said is not None:
        if isinstance(said, Ask):
            said = asking.send(denoise(said.x, said.sigma))
        else:
            yield said
            said = next(asking, None)


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
