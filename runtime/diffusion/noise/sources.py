"""The noise of a request's pictures: one generator per picture, or one for the whole batch.

Samplers with Brownian noise draw from a path over their sigmas; the others draw independent noise.
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
    """The source of the noise of all pictures of a request."""

    def draw(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Return (pictures, *shape) of unit variance to start from."""
        ...

    def source(self, shape: tuple[int, ...], pictures: slice, span: Span | None = None) -> Noise:
        """Return the noise function of a stochastic sampler of `pictures`: Brownian over `span`, or independent."""
        ...


class PictureNoise:
    """Noise for several pictures, each from a generator of its own, as diffusers draws from a list of generators.

    A sampler's draws continue the stream of the picture's initial noise; a Brownian path has the picture's seed
    (diffusers' ``noise_sampler_seed``).
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._seeds = tuple(seeds)
        self._generators = [TorchGenerator(seed) for seed in seeds]

    def draw(self, shape: tuple[int, ...], pictures: slice = slice(None)) -> NDArray[np.float32]:
        """Return (pictures, *shape) of unit variance."""
        return np.stack([generator.randn(shape) for generator in self._generators[pictures]])

    def source(self, shape: tuple[int, ...], pictures: slice, span: Span | None = None) -> Noise:
        """Return the noise function of a stochastic sampler of `pictures`: Brownian over `span`, or independent."""
        if span is None:
            return lambda _sigma, _after: self.draw(shape, pictures)
        paths = [BrownianPath(shape, *span, seed) for seed in self._seeds[pictures]]
        return lambda sigma, after: np.stack([path(sigma, after) for path in paths])


class BatchNoise:
    """Noise of a batch from one generator, as ComfyUI draws it: every call of `draw` restarts the seed's stream.

    A stochastic sampler draws from seed + 1, as ComfyUI does if the latents are on the CPU; a Brownian path has the
    seed itself. Both are drawn for the whole batch, whichever pictures share a call of the UNet.
    """

    def __init__(self, seed: int, count: int) -> None:
        self._seed = seed
        self._count = count

    def draw(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Return (count, *shape) of unit variance."""
        return TorchGenerator(self._seed).randn((self._count, *shape))

    def source(self, shape: tuple[int, ...], pictures: slice, span: Span | None = None) -> Noise:
        """Return the noise function of a stochastic sampler of `pictures`: their part of the whole batch's noise."""
        whole = (self._count, *shape)
        if span is not None:
            path = BrownianPath(whole, *span, self._seed)
            return lambda sigma, after: path(sigma, after)[pictures]
        generator = TorchGenerator(self._seed + 1)
        return lambda _sigma, _after: generator.randn(whole)[pictures]
