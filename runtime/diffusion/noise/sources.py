"""Where the noise of a request's pictures comes from: a generator for each, or one for the whole batch.

Samplers whose noise is Brownian draw it from a path over the sigmas that they go down; the others draw afresh.
"""

__all__ = ["BatchNoise", "NoiseSource", "PictureNoise", "Span"]

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.runtime.diffusion.noise.brownian import BrownianPath
from sdxl_trt.runtime.diffusion.noise.generator import TorchGenerator
from sdxl_trt.runtime.diffusion.samplers import Noise

Span = tuple[float, float]
"""The lowest and the highest sigma of a Brownian path."""


class NoiseSource(Protocol):
    """Where the noise of all pictures of a request comes from."""

    def draw(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Return (pictures, *shape) of unit variance to start from."""
        ...

    def source(self, shape: tuple[int, ...], pictures: slice, span: Span | None = None) -> Noise:
        """Return what a stochastic sampler of these pictures draws from: independent noise, or over `span` Brownian."""
        ...


class PictureNoise:
    """Noise for several pictures, each from a generator of its own, as diffusers draws from a list of generators.

    What a sampler draws continues the stream that the picture's initial noise began; a Brownian path is that of the
    picture's seed (diffusers' ``noise_sampler_seed``).
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._seeds = tuple(seeds)
        self._generators = [TorchGenerator(seed) for seed in seeds]

    def draw(self, shape: tuple[int, ...], pictures: slice = slice(None)) -> NDArray[np.float32]:
        """Return (pictures, *shape) of unit variance."""
        return np.stack([generator.randn(shape) for generator in self._generators[pictures]])

    def source(self, shape: tuple[int, ...], pictures: slice, span: Span | None = None) -> Noise:
        """Return what a stochastic sampler of these pictures draws from: independent noise, or over `span` Brownian."""
        if span is None:
            return lambda _sigma, _after: self.draw(shape, pictures)
        paths = [BrownianPath(shape, *span, seed) for seed in self._seeds[pictures]]
        return lambda sigma, after: np.stack([path(sigma, after) for path in paths])


class BatchNoise:
    """Noise of a batch from one generator, as ComfyUI draws it: whoever asks begins the seed's stream anew.

    A stochastic sampler draws from the seed after it, as ComfyUI does where the latents are on the CPU; a Brownian path
    has the seed itself. Either is drawn for the whole batch, whichever pictures share a call.
    """

    def __init__(self, seed: int, count: int) -> None:
        self._seed = seed
        self._count = count

    def draw(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Return (count, *shape) of unit variance."""
        return TorchGenerator(self._seed).randn((self._count, *shape))

    def source(self, shape: tuple[int, ...], pictures: slice, span: Span | None = None) -> Noise:
        """Return what a stochastic sampler of these pictures draws from: their part of the whole batch's noise."""
        whole = (self._count, *shape)
        if span is not None:
            path = BrownianPath(whole, *span, self._seed)
            return lambda sigma, after: path(sigma, after)[pictures]
        generator = TorchGenerator(self._seed + 1)
        return lambda _sigma, _after: generator.randn(whole)[pictures]
