"""An optimization profile: the smallest, usual and largest shape of each input of a graph, and the names of its axes.

An axis is a number, a name, or follows from a named one: "8*height", "height/2". Of an input that may be left out,
each axis may also be 1: "height/2|1".
"""

__all__ = ["Axes", "Profile", "Range", "axis_range", "axis_root", "axis_size", "fixed", "may_be_one"]

import re
from collections.abc import Mapping
from functools import cache

from sdxl_trt.engines.bundle.records import Positive, Record


class Range(Record, frozen=True, kw_only=True):
    """The smallest, usual (the plan is tuned for it) and largest value of one axis."""

    min: Positive
    opt: Positive
    max: Positive

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int) and self.min <= value <= self.max

    def __str__(self) -> str:
        return f"{self.opt}" if self.min == self.max else f"{self.min}:{self.opt}:{self.max}"

    def times(self, factor: int) -> "Range":
        """Return the range multiplied by `factor`."""
        return Range(min=self.min * factor, opt=self.opt * factor, max=self.max * factor)

    def over(self, factor: int) -> "Range":
        """Return the range divided by `factor`, which divides all three values."""
        return Range(min=self.min // factor, opt=self.opt // factor, max=self.max // factor)


def fixed(value: int) -> Range:
    """Return the range that contains only `value`."""
    return Range(min=value, opt=value, max=value)


_AXIS = re.compile(r"(?:([1-9]\d{0,5})\*)?(\w+?)(?:/([1-9]\d{0,5}))?(\|1)?")


@cache
def _parsed(axis: str) -> tuple[str, int, int, bool]:
    """Return the named axis, its factor, its divisor, and whether the size may be 1; unknown texts are names."""
    match = _AXIS.fullmatch(axis)
    return (axis, 1, 1, False) if match is None else (match[2], int(match[1] or 1), int(match[3] or 1), bool(match[4]))


def axis_root(axis: str) -> str:
    """Return the name of the axis that `axis` follows from: "height" for "8*height"."""
    return _parsed(axis)[0]


def may_be_one(axis: int | str) -> bool:
    """Return whether the size may be 1 whatever the named axis is, so that the values broadcast."""
    return isinstance(axis, str) and _parsed(axis)[3]


def axis_size(axis: int | str, sizes: Mapping[str, int]) -> int:
    """Return the size of `axis` where the named axes have `sizes`; 1 if its name is unknown."""
    if isinstance(axis, int):
        return axis
    name, factor, divisor, _ = _parsed(axis)
    return sizes[name] * factor // divisor if name in sizes else 1


def axis_range(axis: int | str, ranges: "Axes") -> Range:
    """Return the range of `axis` where the named axes have these `ranges`. Raises KeyError for an unknown name."""
    if isinstance(axis, int):
        return fixed(axis)
    name, factor, divisor, optional = _parsed(axis)
    whole = ranges[name]
    low, usual, high = (size * factor // divisor for size in (whole.min, whole.opt, whole.max))
    return Range(min=1 if optional else low, opt=usual, max=high)


Shape = tuple[Positive, ...]
Axes = Mapping[str, Range]


class Profile(Record, frozen=True, kw_only=True):
    """An optimization profile: (min, opt, max) of every input's shape."""

    shapes: dict[str, tuple[Shape, Shape, Shape]]

    def holds(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Return whether the profile accepts inputs of these shapes; inputs without a profile are ignored."""
        return all(self._holds(name, shape) for name, shape in shapes.items() if name in self.shapes)

    def _holds(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.shapes[name]
        if len(shape) != len(low):
            return False
        return all(least <= size <= most for least, size, most in zip(low, shape, high, strict=True))
