"""An optimization profile: the smallest, usual and largest shape of each input of a graph."""

__all__ = ["Axes", "Profile", "Range", "fixed"]

from collections.abc import Mapping

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
