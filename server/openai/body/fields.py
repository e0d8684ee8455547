"""Take the fields of a body one by one, each with a check that names it; what is left over is unknown."""

__all__ = ["Fields", "invalid"]

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from sdxl_trt.server.http import ApiError, kind_of, number_of, told_of, whole_of

T = TypeVar("T")


def invalid(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """Return the error of status 400 for the field `param`; its message begins with the field's name."""
    return ApiError(400, f"{param}: {message}", code, param=param)


class Fields:
    """The fields of a JSON body, or of a form, whose values are all text (`form`).

    null means that a field is absent; in a form that is "null" or nothing at all. Every method raises ApiError (400)
    that names the field, what was expected and, for numbers, what was received: texts are never repeated.
    """

    def __init__(self, body: Mapping[str, Any], *, form: bool = False) -> None:
        self._left = dict(body)
        self._form = form

    def take(self, name: str) -> Any:
        """Return the value of a field, None if it is absent, and count it as known."""
        value = self._left.pop(name, None)
        return None if self._form and value in ("", "null") else value

    def has(self, name: str) -> bool:
        """Return whether the body has a field that was not taken, null or not."""
        return name in self._left

    def text(self, name: str, most: int) -> str | None:
        """Return a text of at most `most` characters."""
        value = self._left.pop(name, None) if self._form else self.take(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise invalid(name, f"{kind_of(value)} was given; give a text")
        if len(value) > most:
            raise invalid(name, f"has {len(value)} characters; give at most {most}")
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise invalid(name, "is not valid Unicode text; give it as UTF-8")
        return value

    def whole(self, name: str, low: int, high: int) -> int | None:
        """Return a whole number from `low` to `high`."""
        value = self.take(name)
        if value is None:
            return None
        number = whole_of(value, texts=self._form)
        if number is None:
            raise invalid(name, f"{told_of(value)} was given; give a whole number from {low} to {high}")
        if not low <= number <= high:
            raise invalid(name, f"{told_of(number)} was given; choose {low} to {high}")
        return number

    def number(self, name: str, low: float, high: float, *, without_low: bool = False) -> float | None:
        """Return a number from `low` (or above it, `without_low`) to `high`."""
        value = self.take(name)
        if value is None:
            return None
        number = number_of(value, texts=self._form)
        least = f"above {low:g}" if without_low else f"{low:g}"
        if number is None or not low <= number <= high or (without_low and number == low):
            raise invalid(name, f"{told_of(value)} was given; choose a number from {least} to {high:g}")
        return number

    def flag(self, name: str) -> bool:
        """Return true or false; false if the field is absent."""
        value = self.take(name)
        if self._form and isinstance(value, str):
            value = {"true": True, "false": False, "1": True, "0": False}.get(value.lower(), value)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise invalid(name, f"{kind_of(value)} was given; give true or false")

    def choice(self, name: str, choices: Sequence[str]) -> str | None:
        """Return one of `choices`."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, str) or value not in choices:
            raise invalid(name, f"is not known; choose one of: {', '.join(choices)}")
        return value

    def json(self, name: str) -> Any:
        """Return a value of any kind; in a form it is JSON, or the text itself if it is not."""
        value = self.take(name)
        if not self._form or not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value

    def either(self, first: str, second: str, read: Callable[[str], T | None]) -> T | None:
        """Return what `read` finds under one of the two names of a field; if both are there, they must be equal."""
        one, other = read(first), read(second)
        if one is not None and other is not None and one != other:
            raise invalid(second, f"says something else than {first}; give one of them")
        return other if one is None else one

    def rest(self) -> list[str]:
        """Return the names of the fields that were not taken, and count them as known."""
        names, self._left = sorted(map(str, self._left)), {}
        return names
