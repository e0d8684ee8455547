"""Functions of float32 values rounded as in torch, where a last bit decides between two timesteps or changes noise.

torch's functions are within a unit in the last place, and nearly always return the nearest float32, as these do.
"""

__all__ = ["exp32", "linspace32", "log32", "power32", "tan32"]

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float32]
Given = NDArray[np.floating] | np.floating | float


def exp32(values: Given) -> Values:
    """Return exp of float32 `values`, rounded once."""
    return _once(np.exp, values)


def log32(values: Given) -> Values:
    """Return the natural logarithm of float32 `values`, rounded once; -inf for 0."""
    with np.errstate(divide="ignore"):
        return _once(np.log, values)


def tan32(values: Given) -> Values:
    """Return tan of float32 `values`, rounded once."""
    return _once(np.tan, values)


def power32(values: Given, exponent: float) -> Values:
    """Return float32 `values` to the power of `exponent`, rounded once."""
    return _once(lambda wide: wide**exponent, values)


def linspace32(start: float, end: float, count: int) -> Values:
    """Return `count` evenly spaced values as ``torch.linspace`` gives them: in float32, counted from the nearer end.

    A product and the sum it is added to are rounded once, as by a fused multiply-add.
    """
    first, last = np.float32(start), np.float32(end)
    if count == 1:
        return np.array([first])
    step, place = np.float64((last - first) / np.float32(count - 1)), np.arange(count)
    rising = np.where(place < count // 2, first + step * place, last - step * (count - 1 - place))
    return rising.astype(np.float32)


def _once(function: Callable[[NDArray[np.float64]], NDArray[np.float64]], values: Given) -> Values:
    exact = np.asarray(values, np.float32).astype(np.float64)
    return np.asarray(function(exact), np.float32)
