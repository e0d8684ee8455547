"""Brownian noise, which agrees over a way between two sigmas and over all its parts: torchsde's tree without torch.

k-diffusion, ComfyUI and diffusers draw the noise of DPM-Solver++'s SDE samplers from torchsde's ``BrownianTree``. The
path is made of halves: each interval has a seed of its own, from numpy's SeedSequence, and the noise of that seed says
how what it gains is shared between its halves (Lévy's bridge). So the path depends on its seed and ends alone, and is
here the same one as there, but for the last places in which our normal values differ from torch's.
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
"""Times are rounded to a millionth (torchsde's ``tol``), where the halving ends."""
POOL_SIZE = 24
KEPT = 48
"""Shares that are kept: two ways from the root, of about 24 halvings each."""


@dataclass(frozen=True)
class _Interval:
    """`key` numbers the intervals of one `depth` from the left; `gain` is what the path changes by within it."""

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
        """Return the noise of the way down from `sigma` to `after`, scaled to unit variance; zeros for no way."""
        # In float32, as the sigmas of those that this follows.
        time, before = np.float32(sigma), np.float32(after)
        low, high = round(float(before), DECIMALS), round(float(time), DECIMALS)
        if low >= high:
            return np.zeros(self._shape, np.float32)
        gain: Values = reduce(np.add, self._within(self._whole, low, high))
        unit: Values = gain / -np.sqrt(time - before)
        return unit

    def _within(self, interval: _Interval, low: float, high: float) -> Iterator[Values]:
        """Yield what the path gains in the largest intervals that `low` to `high` is made of, from the left."""
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
        """Return what the path gains left of the middle: its part of the whole, and noise that is taken back right."""
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
        """Return unit noise with the seed of the interval at `place`; of the root, (), that of its whole gain."""
        sequence = np.random.SeedSequence(self._seed, spawn_key=place, pool_size=POOL_SIZE)
        return TorchGenerator(int(sequence.generate_state(1)[0])).randn(self._shape)
