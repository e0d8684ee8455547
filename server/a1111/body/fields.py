"""Take the fields of a body one by one, each with a check that names it; null means that a field is absent."""

__all__ = ["Fields", "invalid"]

from collections.abc import Iterable, Mapping
from typing import Any

from sdxl_trt.server.http import ApiError, kind_of, number_of, told_of, whole_of


def invalid(field: str, message: str, status: int = 422) -> ApiError:
    """Return the refusal of a field; its message begins with the field's name."""
    return ApiError(status, f"{field}: {message}", "invalid_value", param=field)


class Fields:
    """The fields of a JSON object. Every method raises ApiError (422) that names the field and what was expected.

    Numbers may be given as texts, as A1111's own types take them. Texts of a client are never repeated. `within` names
    the object in errors.
    """

    def __init__(self, body: Mapping[str, Any], within: str = "") -> None:
        self._left = dict(body)
        self._within = f"{within}." if within else ""

    def take(self, name: str) -> Any:
        """Return the value of a field, None if it is absent, and count it as known."""
        return self._left.pop(name, None)

    def text(self, name: str, most: int, default: str = "") -> str:
        """Return a text of at most `most` characters."""
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.invalid(name, f"{kind_of(value)} was given; give a text")
        if len(value) > most:
            raise self.invalid(name, f"has {len(value)} characters; give at most {most}")
        return value

    def whole(self, name: str, low: int, high: int, default: int) -> int:
        """Return a whole number from `low` to `high`."""
        value = self.take(name)
        if value is None:
            return default
        number = whole_of(value, texts=True)
        if number is None:
            raise self.invalid(name, f"{told_of(value)} was given; give a whole number from {low} to {high}")
        if not low <= number <= high:
            raise self.invalid(name, f"{number} was given; choose {low} to {high}")
        return number

    def number(self, name: str, low: float, high: float, default: float) -> float:
        """Return a number from `low` to `high`."""
        found = self.number_or_none(name, low, high)
        return default if found is None else found

    def number_or_none(self, name: str, low: float, high: float) -> float | None:
        """Return a number from `low` to `high`; None if it is absent."""
        value = self.take(name)
        if value is None:
            return None
        number = number_of(value, texts=True)
        if number is None or not low <= number <= high:
            raise self.invalid(name, f"{told_of(value)} was given; choose a number from {low:g} to {high:g}")
        return number

    def flag(self, name: str, *, default: bool = False) -> bool:
        """Return true or false; 1 and 0 are those too."""
        value = self.take(name)
        if value is None:
            return default
        known = {True: True, False: False, "true": True, "false": False, "": default}
        found = known.get(value.lower() if isinstance(value, str) else value) if _is_plain(value) else None
        if found is None:
            raise self.invalid(name, f"{kind_of(value)} was given; give true or false")
        return found

    def items(self, name: str, most: int) -> list[Any]:
        """Return a list of at most `most` items."""
        value = self.take(name)
        if value is None:
            return []
        if not isinstance(value, list) or len(value) > most:
            raise self.invalid(name, f"give a list of at most {most} items")
        return value

    def object(self, name: str) -> dict[str, Any]:
        """Return an object."""
        value = self.take(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.invalid(name, f"{kind_of(value)} was given; give an object")
        return value

    def rest(self) -> dict[str, Any]:
        """Return the fields that were not taken, and count them as known."""
        left, self._left = self._left, {}
        return left

    def drop(self, names: Iterable[str]) -> None:
        """Count fields as known."""
        for name in names:
            self._left.pop(name, None)

    def invalid(self, name: str, message: str) -> ApiError:
        """Return the refusal of a field of this object."""
        return invalid(f"{self._within}{name}", message)


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)
