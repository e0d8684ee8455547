"""The size of the pictures: one that the bundle's models and plans take, or a refusal that names the nearest."""

__all__ = ["Sizes", "parse_size"]

import math
import re
from dataclasses import dataclass

from sdxl_trt.engines.bundle import Manifest
from sdxl_trt.engines.plans import PlanLimits
from sdxl_trt.server.openai.body.fields import invalid

_SIZE = re.compile(r"(\d{1,6})x(\d{1,6})", re.ASCII)
MOST_SIDE = 16384
Size = tuple[int, int]
"""(height, width) in pixels."""


def parse_size(text: str | None) -> Size | None:
    """Return (height, width) of "WxH", None for "auto" or no size. Raises ApiError."""
    if text is None or text == "auto":
        return None
    found = _SIZE.fullmatch(text)
    if found is None:
        raise invalid("size", 'is not a size; give width and height in pixels, "1024x768" say, or "auto"')
    return int(found[2]), int(found[1])


@dataclass(frozen=True)
class Sizes:
    """What the models take: sides that are multiples of `multiple`, from `low` to `high`, and at most `pixels`.

    `low` and `high` are (height, width); `usual` is the size without a request.
    """

    multiple: int
    low: Size
    high: Size
    usual: Size
    pixels: int

    @classmethod
    def of(cls, manifest: Manifest, limits: PlanLimits | None, pixels: int, *, refined: bool) -> "Sizes":
        """Return the sizes of a bundle with plans of these `limits`; `refined` if its refiner runs too."""
        base = manifest.base
        stages = manifest.stages().values() if refined else (base,)
        multiple = math.lcm(*(stage.size_multiple for stage in stages))
        side = max(base.sample_size * base.vae.factor // multiple, 1) * multiple
        if limits is None:
            most = MOST_SIDE // multiple * multiple
            return cls(multiple, (multiple, multiple), (most, most), (side, side), pixels)
        ranges = limits.height, limits.width
        low, high = (tuple(bound) for bound in ((-(-each.min // multiple) * multiple for each in ranges),
                                                (each.max // multiple * multiple for each in ranges)))  # fmt: skip
        return cls(multiple, low, high, (limits.height.opt, limits.width.opt), pixels)  # type: ignore[arg-type]

    def takes(self, size: Size) -> bool:
        """Return whether pictures of `size` can be drawn."""
        fits = all(low <= side <= high and side % self.multiple == 0
                   for side, low, high in zip(size, self.low, self.high, strict=True))  # fmt: skip
        return fits and size[0] * size[1] <= self.pixels

    def check(self, size: Size) -> Size:
        """Return `size`. Raises ApiError, which names the nearest size, if it cannot be drawn."""
        if self.takes(size):
            return size
        near = self.nearest(size)
        (least, most), rule = (self.low, self.high), f"multiples of {self.multiple}"
        raise invalid("size", f"{told(size)} was given; the models take {rule}, from {told(least)} to {told(most)} and"
                              f" at most {self.pixels} pixels: the nearest size is {told(near)}")  # fmt: skip

    def nearest(self, size: Size) -> Size:
        """Return the size nearest to `size` that can be drawn; one of too many pixels keeps its shape."""
        shrink = min(1.0, math.sqrt(self.pixels / max(size[0] * size[1], 1)))
        step = math.floor if shrink < 1.0 else round
        rounded = (int(step(side * shrink / self.multiple)) * self.multiple for side in size)
        height, width = (min(max(side, low), high)
                         for side, low, high in zip(rounded, self.low, self.high, strict=True))  # fmt: skip
        if height * width <= self.pixels:
            return height, width
        # A side that was raised to the least leaves less room for the other one.
        most = self.pixels // min(height, width) // self.multiple * self.multiple
        return min(height, max(most, self.low[0])), min(width, max(most, self.low[1]))

    def for_picture(self, size: Size) -> Size:
        """Return the size in which a picture of `size` is drawn anew: its own, or one of its shape and usual area."""
        usual = self.usual[0] * self.usual[1]
        shrink = min(1.0, math.sqrt(usual / max(size[0] * size[1], 1)))
        return (
            size
            if self.takes(size) and shrink == 1.0
            else self.nearest((round(size[0] * shrink), round(size[1] * shrink)))
        )


def told(size: Size) -> str:
    """Return a size as "WxH"."""
    return f"{size[1]}x{size[0]}"
