"""Brownian noise, whose increment over an interval is the sum of its parts' increments: torchsde's tree without torch.

k-diffusion, ComfyUI and diffusers draw the noise of DPM-Solver++'s SDE samplers from torchsde's ``BrownianTree``. The
path is built by bisection: each interval has a seed of its own, from numpy's SeedSequence, and noise of that seed
splits its increment between its halves (Brownian bridge). So the path depends only on its seed and ends, and equals
torchsde's except for the last digits in which our normal values differ from torch's.
"""

__all__ = ["BrownianPath"]

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.runtime.diffusion.noise.generator import TorchGenerator

Values = NDArray[np.float32]

DECIMALS = 6
"""Times are rounded to a millionth (torchsde's ``tol``), at which the bisection stops."""
POOL_SIZE = 24
KEPT = 48
"""The number of cached increments: two descents from the root, of about 24 bisections each."""


@dataclass(frozen=True)
class _Interval:
    """`key` numbers the intervals of one `depth` from the left; `gain` is the path's increment over the interval."""

    start: float
    end: float
    key: int
    depth: int
    gain: Values


class BrownianPath:
    """A Brownian path over sigmas from `low` to `high`, of arrays of `shape`, for one `seed` from 0 to 2^64 - 1."""

    def __init__(self, shape: tuple[int, ...], low: float, high: float, seed: int) -> None:
        self._shape = shape
        self._seed = seed
        self._kept: OrderedDict[tuple[int, int], Values] = OrderedDict()
        low, high = float(np.float32(low)), float(np.float32(high))
        gain = self._normal(()) * np.float32(math.sqrt(high - low))
        self._whole = _Interval(round(low, DECIMALS), round(high, DECIMALS), 0, 0, gain)

    def __call__(self, sigma: float, after: float) -> Values:
        """Return the increment from `sigma` down to `after`, scaled to unit variance; zeros if both are equal."""
        # In float32, as in torchsde's callers.
        time, before = np.float32(sigma), np.float32(after)
        low, high = round(float(before), DECIMALS), round(float(time), DECIMALS)
        if low >= high:
            return np.zeros(self._shape, np.float32)
        gain: Values = reduce(np.add, self._within(self._whole, low, high))
        unit: Values = gain / -np.sqrt(time - before)
        return unit

    def _within(self, interval: _Interval, low: float, high: float) -> Iterator[Values]:
        """Yield the increments of the largest intervals that together cover `low` to `high`, from the left."""
        if low <= interval.start and interval.end <= high:
            yield interval.gain
        elif low < interval.end and interval.start < high:
            for half in self._halves(interval):
                yield from self._within(half, low, high)

    def _halves(self, interval: _Interval) -> tuple[_Interval, _Interval]:
        start, end, key, depth = interval.start, interval.end, 2 * interval.key, interval.depth + 1
        middle = round(0.5 * (start + end), DECIMALS)
        left = self._share(interval, middle)
        return _Interval(start, middle, key, depth, left), _Interval(middle, end, key + 1, depth, interval.gain - left)

    def _share(self, interval: _Interval, middle: float) -> Values:
        """Return the increment left of the middle: a share of the whole, plus noise that the right half subtracts."""
        place = (interval.key, interval.depth)
        if place not in self._kept:
            left, right = middle - interval.start, interval.end - middle
            reciprocal = 1.0 / (interval.end - interval.start)
            share = interval.gain * np.float32(left)
            share *= np.float32(reciprocal)
            share += self._normal(place) * np.float32(math.sqrt(left * right * reciprocal))
            self._kept[place] = share
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(place)
        return self._kept[place]

    def _normal(self, place: tuple[int, ...]) -> Values:
        """Return unit noise with the seed of the interval at `place`; () is the root, for the whole increment."""
        sequence = np.random.SeedSequence(self._seed, spawn_key=place, pool_size=POOL_SIZE)
        return TorchGenerator(int(sequence.generate_state(1)[0])).randn(self._shape)
