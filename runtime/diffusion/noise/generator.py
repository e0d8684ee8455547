"""The noise of ``torch.randn`` on the CPU, without torch.

A seed must give the same picture as in diffusers, so the generator is torch's: a 32-bit Mersenne Twister,
24-bit uniforms, and a Box-Muller transform over blocks of 16 (ATen's ``DistributionTemplates.h``,
``TransformationHelper.h``). Values agree with torch 2.13 to 3 units in the last place: torch evaluates
logarithm and cosine with vectorized polynomials of its own.
"""

__all__ = ["TorchGenerator"]

import numpy as np
from numpy.typing import NDArray

BLOCK = 16
_HALF = BLOCK // 2
_MANTISSA = np.uint32((1 << 24) - 1)


class TorchGenerator:
    """A ``torch.Generator`` on the CPU; successive draws continue one stream.

    `seed` is any integer from 0 to 2^64 - 1; as in torch, the Mersenne Twister uses its low 32 bits.
    """

    def __init__(self, seed: int) -> None:
        # RandomState is the public API for the seeding that torch uses (init_genrand).
        self._state = np.random.RandomState(seed & 0xFFFFFFFF)
        self._cached: float | None = None

    def randn(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Return standard normal float32 values as ``torch.randn(shape, generator=self)`` would."""
        size = int(np.prod(shape))
        values = self._filled(size) if size >= BLOCK else self._one_by_one(size)
        return values.reshape(shape)

    def _words(self, count: int) -> NDArray[np.uint32]:
        return self._state.randint(0, 1 << 32, size=count, dtype=np.uint32)

    def _uniform(self, count: int) -> NDArray[np.float32]:
        words = self._words(count)
        words &= _MANTISSA
        values = words.view(np.int32).astype(np.float32)
        values *= np.float32(2.0**-24)
        return values

    def _filled(self, size: int) -> NDArray[np.float32]:
        values = self._uniform(size)
        _box_muller(values[: size - size % BLOCK])
        if size % BLOCK:
            # torch redraws the last 16 values instead of transforming an incomplete block.
            values[-BLOCK:] = self._uniform(BLOCK)
            _box_muller(values[-BLOCK:])
        return values

    def _one_by_one(self, size: int) -> NDArray[np.float32]:
        return np.array([self._next_double() for _ in range(size)], dtype=np.float32)

    def _next_double(self) -> float:
        """Return the next normal value in double precision; like torch, cache a pair's sine value for the next call."""
        if self._cached is not None:
            value, self._cached = self._cached, None
            return value
        u1, u2 = self._uniform_double(), self._uniform_double()
        radius, theta = np.sqrt(-2.0 * np.log1p(-u2)), 2.0 * np.pi * u1
        self._cached = float(radius * np.sin(theta))
        return float(radius * np.cos(theta))

    def _uniform_double(self) -> float:
        # Two words make 64 bits; the first is the upper half.
        high, low = map(int, self._words(2))
        return (high << 32 | low) % (1 << 53) * 2.0**-53


def _box_muller(uniform: NDArray[np.float32]) -> None:
    """Transform blocks of 16 uniforms in place: the first eight give radii, the last eight angles."""
    blocks = uniform.reshape(-1, 2, _HALF)
    radius = np.float32(1.0) - blocks[:, 0]
    np.log(radius, out=radius)
    radius *= np.float32(-2.0)
    np.sqrt(radius, out=radius)
    theta = blocks[:, 1] * np.float32(2.0 * np.pi)
    np.multiply(radius, np.cos(theta), out=blocks[:, 0])
    np.multiply(radius, np.sin(theta, out=theta), out=blocks[:, 1])
