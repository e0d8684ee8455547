"""Values of a body's fields: which of them are numbers, and what an error says of the others."""

__all__ = ["kind_of", "number_of", "told_of", "whole_of"]

import math
import re
from typing import Any

_WHOLE = re.compile(r"\s*[+-]?\d{1,30}\s*", re.ASCII)
_MOST_EXACT = 2**53
"""JSON's numbers with a point are doubles, which hold every whole number up to this one."""
_KINDS = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object"}


def whole_of(value: Any, *, texts: bool) -> int | None:
    """Return a whole number, None for another value; with `texts` it may be written in a text."""
    if isinstance(value, str):
        return int(value) if texts and _WHOLE.fullmatch(value) else None
    if isinstance(value, bool):
        return None
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) <= _MOST_EXACT else None
    return value if isinstance(value, int) else None


def number_of(value: Any, *, texts: bool) -> float | None:
    """Return a finite number, None for another value; with `texts` it may be written in a text."""
    if isinstance(value, bool) or not isinstance(value, str | int | float if texts else int | float):
        return None
    if isinstance(value, str) and ("_" in value or not value.isascii()):  # Python's own ways to write a number
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def kind_of(value: Any) -> str:
    """Return the name of a value's kind: "a text" for a text."""
    return _KINDS.get(type(value), "another kind of value")


def told_of(value: Any) -> str:
    """Return a number as text, and the kind of any other value, since what a client wrote is not repeated."""
    plain = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
    return f"{value}" if plain else kind_of(value)
