"""SVG as text: elements that escape whatever they are given, scales, and ticks at round numbers."""

__all__ = ["Scale", "element", "markup", "nice_ticks", "shortened", "tick_label", "words"]

import html
import math
from dataclasses import dataclass

from sdxl_trt.benchmarks.report.quantities import plain

LETTER = 0.56
"""Width of an average letter of a sans-serif font, as a share of its size."""


def element(tag: str, /, *content: str, **attributes: str | float) -> str:
    """Return an element around `content`, which is markup; values of attributes are escaped.

    An underscore in an attribute's name is a hyphen, one at its end is none: ``class_``, ``stroke_width``.
    """
    given = "".join(f' {key.rstrip("_").replace("_", "-")}="{_value(value)}"' for key, value in attributes.items())
    return f"<{tag}{given}>{''.join(content)}</{tag}>" if content else f"<{tag}{given}/>"


def _value(value: str | float) -> str:
    if isinstance(value, str):
        return markup(value)
    return f"{value:.2f}".rstrip("0").rstrip(".") if math.isfinite(value) else "0"


def markup(text: str) -> str:
    """Return any text as markup that shows it."""
    return html.escape(plain(text))


def words(x: float, y: float, text: str, *content: str, **attributes: str | float) -> str:
    """Return `text`, escaped, at a point; `content` is markup that follows it, a title."""
    return element("text", markup(text), *content, x=x, y=y, **attributes)


def shortened(text: str, width: float, size: float) -> str:
    """Return `text`, cut where it is wider than `width` pixels in letters of `size`."""
    letters = max(1, int(width / (size * LETTER)))
    line = plain(text)
    return line if len(line) <= letters else f"{line[: letters - 1]}…"


@dataclass(frozen=True)
class Scale:
    """A linear map of `low`…`high` to pixels `start`…`end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the pixel of `value`; beyond the ends it is the end's."""
        if self.high <= self.low:
            return self.start
        share = min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))
        return self.start + share * (self.end - self.start)


def nice_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Return round numbers, `about` as many steps, the first at or below `low` and the last at or above `high`."""
    span = high - low
    if not math.isfinite(span) or span <= abs(high) * 1e-9 or span < 1e-290:
        return [low, low + (abs(low) or 1.0)]
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(nice * power for nice in (1.0, 2.0, 2.5, 5.0, 10.0) if nice * power * about >= span * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def tick_label(value: float) -> str:
    """Return a tick as short as it can be said."""
    return f"{value:.6g}"
