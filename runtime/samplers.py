"""Samplers: each one a function of (denoise, x, sigmas), in the manner of k-diffusion.

A sampler yields the latents after every step; progress, previews, timing and cancellation belong to the caller.
"""

__all__ = ["SAMPLERS", "Denoise", "Sampler", "euler"]

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Latents = NDArray[np.float32]
Denoise = Callable[[Latents, float], Latents]
Sampler = Callable[[Denoise, Latents, NDArray[np.float32]], Iterator[Latents]]


def euler(denoise: Denoise, x: Latents, sigmas: NDArray[np.float32]) -> Iterator[Latents]:
    """Euler steps along the probability flow ODE (algorithm 2 of arXiv 2206.00364, without churn).

    `denoise(x, sigma)` estimates the clean latents in `x` (n, c, h, w); `sigmas` are (steps + 1,), falling.
    """
    for sigma, sigma_next in pairwise(sigmas):
        derivative = (x - denoise(x, float(sigma))) / sigma
        x = x + derivative * (sigma_next - sigma)
        yield x


SAMPLERS: dict[str, Sampler] = {"euler": euler}
