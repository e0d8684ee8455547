"""Parse the arguments in pybind11's docstrings, and check calls against them."""

__all__ = ["CLASSES", "Argument", "bind", "parse"]

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from simulated.errors import SimulationError

CLASSES: dict[str, type] = {}
"""The stand-ins, by their originals' names in docstrings."""


class Argument(NamedTuple):
    name: str
    type: str
    required: bool


@functools.cache
def parse(signature: str) -> tuple[Argument, ...]:
    """Return the arguments of ``(self: Class, name: type = default) -> type`` without self."""
    inside = (
        signature[1 : signature.rindex(")")] if signature.endswith(")") else signature[1 : signature.rindex(") ->")]
    )
    return tuple(_arguments(inside))[1:]


def _arguments(text: str) -> Iterator[Argument]:
    for part in re.split(r",\s*(?![^\[<]*[\]>])", text):
        head, _, default = part.partition(" = ")
        name, _, kind = head.partition(": ")
        if name not in ("", "/"):
            yield Argument(name, kind, not default)


def _is_integer(value: object) -> bool:
    return not isinstance(value, float | str) and (hasattr(value, "__index__") or hasattr(value, "__int__"))


def _is_buffer(value: object) -> bool:
    try:
        memoryview(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True


_BUILT_IN: dict[str, Callable[[Any], bool]] = {
    "typing.SupportsInt": _is_integer,
    "typing_extensions.Buffer": _is_buffer,
    "bool": lambda value: isinstance(value, bool | np.bool_),
    "str": lambda value: isinstance(value, str),
    "list": lambda value: isinstance(value, list),
    "tuple": lambda value: isinstance(value, tuple),
    "slice": lambda value: isinstance(value, slice),
    "": lambda value: True,
}


def accepts(kind: str, value: object) -> bool:
    """Return whether pybind11 accepts `value` for an argument of type `kind` in its docstring."""
    if kind in _BUILT_IN:
        return _BUILT_IN[kind](value)
    if kind.startswith("collections.abc.Sequence["):
        inner = kind[kind.index("[") + 1 : -1]
        return isinstance(value, Sequence) and not isinstance(value, str) and all(accepts(inner, v) for v in value)
    known = CLASSES.get(kind)
    if known is None:
        raise SimulationError(f"{kind} is not simulated; add it to tests/simulated")
    return isinstance(value, known)


def bind(name: str, overloads: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments by name, for the first overload that accepts them; else raise pybind11's TypeError."""
    for signature in overloads:
        bound = _fit(parse(signature), args, kwargs)
        if bound is not None:
            return bound
    known = "\n".join(f"    {i}. {signature}" for i, signature in enumerate(overloads, 1))
    given = ", ".join([*map(repr, args), *(f"{key}={value!r}" for key, value in kwargs.items())])
    raise TypeError(
        f"{name}(): incompatible function arguments. The following argument types are supported:\n{known}\n\n"
        f"Invoked with: {given}"
    )


def _fit(arguments: tuple[Argument, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    names = [argument.name for argument in arguments]
    if len(args) > len(names) or not set(kwargs) <= set(names[len(args) :]):
        return None
    given = dict(zip(names, args, strict=False)) | kwargs
    for argument in arguments:
        if argument.name not in given:
            if argument.required:
                return None
        elif not accepts(argument.type, given[argument.name]):
            return None
    return given
