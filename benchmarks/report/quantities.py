"""Figures as a reader takes them in: three digits, a unit, and one unit for all that stand together."""

__all__ = ["Unit", "memory", "plain", "significant", "time_unit", "times"]

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

_SECONDS = (("µs", 1e-6), ("ms", 1e-3), ("s", 1.0))
_BYTES = (("kB", 1e3), ("MB", 1e6), ("GB", 1e9))
# What XML forbids, and what turns the direction of writing: a name could pass for another one with it.
_UNFIT = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


@dataclass(frozen=True)
class Unit:
    """A unit by its name and its size in seconds, bytes or whatever is measured."""

    name: str
    size: float = 1.0

    def show(self, amount: float) -> str:
        """Return `amount`, in base units, in this one."""
        return f"{significant(amount / self.size)} {self.name}".rstrip()


def time_unit(seconds: Iterable[float]) -> Unit:
    """Return the unit in which all of `seconds` are read best: the one that suits the largest."""
    return _suiting(seconds, _SECONDS)


def memory_unit(sizes: Iterable[float]) -> Unit:
    """Return the unit in which all of `sizes`, in bytes, are read best; a power of ten."""
    return _suiting(sizes, _BYTES)


def _suiting(amounts: Iterable[float], units: tuple[tuple[str, float], ...]) -> Unit:
    largest = max((abs(amount) for amount in amounts if math.isfinite(amount)), default=0.0)
    fitting = [unit for unit in units if unit[1] <= largest]
    return Unit(*(fitting or units)[-1 if fitting else 0])


def times(ratio: float) -> str:
    """Return a ratio as a reader says it: 0.540×."""
    return f"{significant(ratio)}×"


def memory(size: float) -> str:
    """Return a number of bytes in the unit that suits it."""
    return memory_unit([size]).show(size)


def significant(value: float, digits: int = 3) -> str:
    """Return `value` with `digits` significant digits, all digits of whole numbers up to ten million."""
    if not math.isfinite(value):
        return str(value).replace("inf", "∞")
    if value == 0:
        return "0"
    value = float(f"{value:.{digits - 1}e}") if abs(value) < 10**digits else value
    power = math.floor(math.log10(abs(value)))
    if power < -5 or power > 6:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - power)}f}"


def plain(text: str) -> str:
    """Return `text` in one line without the characters that no document may hold; they become U+FFFD."""
    return _UNFIT.sub("\ufffd", re.sub(r"[\t\r\n\u0085\u2028\u2029]+", " ", text)).strip()
