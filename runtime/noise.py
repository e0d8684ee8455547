"""The noise of ``torch.randn`` on the CPU, without torch.

The same seed gives the same picture as in diffusers, so the generator is torch's: a 32-bit Mersenne Twister,
24-bit uniforms, and a Box-Muller transform over blocks of 16 (ATen's ``DistributionTemplates.h``,
``TransformationHelper.h``). Values agree with torch 2.13 to 3 units in the last place: torch evaluates
logarithm and cosine with vectorized polynomials of its own.
"""

__all__ = ["BatchNoise", "NoiseSource", "PictureNoise", "TorchGenerator"]

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

BLOCK = 16
_HALF = BLOCK // 2
_MANTISSA = np.uint64((1 << 24) - 1)
_MANTISSA_64 = np.uint64((1 << 53) - 1)


class TorchGenerator:
    """A ``torch.Generator`` on the CPU; successive draws continue one stream.

    `seed` is any integer from 0 to 2^64 - 1; like torch, the Mersenne Twister takes its low 32 bits.
    """

    def __init__(self, seed: int) -> None:
        self._bits = np.random.MT19937()
        # RandomState is the public way to the seeding that torch uses (init_genrand).
        seeded: Any = np.random.RandomState(seed & 0xFFFFFFFF).get_state(legacy=False)
        self._bits.state = seeded
        self._cached: float | None = None

    def randn(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Return standard normal float32 values as ``torch.randn(shape, generator=self)`` would."""
        size = int(np.prod(shape))
        values = self._filled(size) if size >= BLOCK else self._one_by_one(size)
        return values.reshape(shape)

    def _uniform(self, count: int) -> NDArray[np.float32]:
        words = self._bits.random_raw(count)
        return (words & _MANTISSA).astype(np.float32) * np.float32(2.0**-24)

    def _filled(self, size: int) -> NDArray[np.float32]:
        values = self._uniform(size)
        whole = size - size % BLOCK
        values[:whole] = _box_muller(values[:whole])
        if size % BLOCK:
            # torch draws the last 16 anew rather than transform an incomplete block.
            values[-BLOCK:] = _box_muller(self._uniform(BLOCK))
        return values

    def _one_by_one(self, size: int) -> NDArray[np.float32]:
        return np.array([self._next_double() for _ in range(size)], dtype=np.float32)

    def _next_double(self) -> float:
        """Return the next normal in double precision; torch keeps the sine's half of a pair for the next call."""
        if self._cached is not None:
            value, self._cached = self._cached, None
            return value
        u1, u2 = self._uniform_double(), self._uniform_double()
        radius, theta = np.sqrt(-2.0 * np.log1p(-u2)), 2.0 * np.pi * u1
        self._cached = float(radius * np.sin(theta))
        return float(radius * np.cos(theta))

    def _uniform_double(self) -> float:
        # Two words make 64 bits, the first one the upper half.
        high, low = self._bits.random_raw(2)
        return float(((high << np.uint64(32)) | low) & _MANTISSA_64) * 2.0**-53


class NoiseSource(Protocol):
    """Where the noise of all pictures of a request comes from."""

    def draw(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Return (pictures, *shape) of unit variance to start from."""
        ...

    def source(self, shape: tuple[int, ...], pictures: slice) -> Callable[[float, float], NDArray[np.float32]]:
        """Return what a stochastic sampler of these pictures draws from, whichever sigmas it goes between."""
        ...


class PictureNoise:
    """Noise for several pictures, each from a generator of its own, as diffusers draws from a list of generators.

    What a sampler draws continues the stream that the picture's initial noise began.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [TorchGenerator(seed) for seed in seeds]

    def draw(self, shape: tuple[int, ...], pictures: slice = slice(None)) -> NDArray[np.float32]:
        """Return (pictures, *shape) of unit variance."""
        return np.stack([generator.randn(shape) for generator in self._generators[pictures]])

    def source(self, shape: tuple[int, ...], pictures: slice) -> Callable[[float, float], NDArray[np.float32]]:
        """Return what a stochastic sampler of these pictures draws from, whichever sigmas it goes between."""
        return lambda _sigma, _after: self.draw(shape, pictures)


class BatchNoise:
    """Noise of a batch from one generator, as ComfyUI draws it: whoever asks begins the seed's stream anew.

    A stochastic sampler draws from the seed after it, as ComfyUI does where the latents are on the CPU; its noise does
    not depend on which pictures share a call.
    """

    def __init__(self, seed: int, count: int) -> None:
        self._seed = seed
        self._count = count

    def draw(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Return (count, *shape) of unit variance."""
        return TorchGenerator(self._seed).randn((self._count, *shape))

    def source(self, shape: tuple[int, ...], pictures: slice) -> Callable[[float, float], NDArray[np.float32]]:
        """Return what a stochastic sampler of these pictures draws from: their part of the whole batch's noise."""
        generator = TorchGenerator(self._seed + 1)
        return lambda _sigma, _after: generator.randn((self._count, *shape))[pictures]


def _box_muller(uniform: NDArray[np.float32]) -> NDArray[np.float32]:
    """Transform blocks of 16 uniforms: the first eight give radii, the last eight angles."""
    blocks = uniform.reshape(-1, 2, _HALF)
    radius = np.sqrt(np.float32(-2.0) * np.log(np.float32(1.0) - blocks[:, 0]))
    theta = np.float32(2.0 * np.pi) * blocks[:, 1]
    normal = np.stack([radius * np.cos(theta), radius * np.sin(theta)], axis=1)
    return normal.reshape(-1).astype(np.float32)
