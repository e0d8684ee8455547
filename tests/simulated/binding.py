"""Stand-ins for pybind11 classes: they define only what the real binding has, and reject the calls that it rejects.

A class with an `original=` is checked against the specification read from the real binding. At its definition: every
method and property that it defines exists there, with the same arguments. In use: arguments fit an overload, only
settable properties are set, and no other name is accessed.
"""

__all__ = ["LOCK", "Bound", "BoundMeta", "Enumeration", "enumeration", "specification"]

import functools
import inspect
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from simulated.errors import SimulationError
from simulated.signatures import CLASSES, bind, parse

FILE = Path(__file__).parent / "tensorrt_11_4.json"
HOME = "tensorrt_bindings.tensorrt"
LOCK = threading.RLock()
"""One call at a time: the code under test may use several threads, and the checks depend on the order of calls."""


@functools.cache
def specification() -> dict[str, Any]:
    """Return the file that `read_binding` wrote."""
    loaded: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return loaded


class BoundMeta(type):
    """Checks a stand-in against its original at its definition, and makes its methods reject the same calls."""

    original: str | None

    def __new__(cls, name: str, bases: tuple[type, ...], body: dict[str, Any], original: str | None = None) -> Any:
        if original is not None:
            spec = _find(original)
            _check(original, spec, body)
            _wrap(original, spec, body)
            body["__module__"] = HOME
            body["__qualname__"] = original
        made = super().__new__(cls, name, bases, body)
        made.original = original
        if original is not None:
            CLASSES[original.rpartition(".")[2]] = made
        return made

    def __init__(cls, name: str, bases: tuple[type, ...], body: dict[str, Any], original: str | None = None) -> None:
        super().__init__(name, bases, body)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        home = next(each for each in cls.__mro__ if getattr(each, "original", None))
        if "__init__" not in _find(home.original).get("methods", {}):
            raise TypeError(f"{HOME}.{home.original}: No constructor defined!")
        made = super().__call__(*args, **kwargs)
        if not made.__dict__.get("_constructed"):
            raise TypeError(f"{HOME}.{home.original}.__init__() must be called when overriding __init__")
        return made

    def __getattr__(cls, name: str) -> Any:
        raise missing(next(each for each in cls.__mro__ if each.__dict__.get("original")), name)


def _find(original: str) -> dict[str, Any]:
    spec: dict[str, Any] = {"nested": specification()["classes"]}
    for part in original.split("."):
        spec = spec["nested"][part]
    return spec


def missing(cls: Any, name: str) -> Exception:
    """Return the exception for a name that a stand-in does not define."""
    for each in cls.__mro__:
        original = each.__dict__.get("original")
        spec = _find(original) if original else {}
        if name in {**spec.get("methods", {}), **spec.get("properties", {})}:
            return SimulationError(f"{original}.{name} is not simulated; add it to tests/simulated")
    return AttributeError(f"'{HOME}.{cls.original}' object has no attribute {name!r}")


def _check(original: str, spec: dict[str, Any], body: dict[str, Any]) -> None:
    for name, value in body.items():
        if name.startswith("_") and name not in spec.get("methods", {}):
            continue  # Python's own names, and private ones of stand-ins
        if isinstance(value, property):
            modes = spec.get("properties", {}).get(name)
            if modes is None or (value.fset is not None and "w" not in modes) or "r" not in modes:
                raise SimulationError(f"{original}.{name} is not such a property of the real binding: {modes!r}")
        elif inspect.isfunction(value):
            _check_method(original, name, value, spec)
        elif name not in spec.get("nested", {}):
            raise SimulationError(f"{original}.{name} is not an attribute of the real binding")


def _check_method(original: str, name: str, method: Callable[..., Any], spec: dict[str, Any]) -> None:
    overloads = spec.get("methods", {}).get(name)
    if overloads is None:
        raise SimulationError(f"{original}.{name} is not a method of the real binding")
    own = list(inspect.signature(method).parameters)[1:]
    if not all(argument.name in own for signature in overloads for argument in parse(signature)) and name != "__exit__":
        raise SimulationError(f"{original}.{name} takes {own}, the real binding {overloads}")
    known = {argument.name for signature in overloads for argument in parse(signature)}
    if set(own) - known:
        raise SimulationError(f"{original}.{name} takes {sorted(set(own) - known)}, the real binding does not")


def _wrap(original: str, spec: dict[str, Any], body: dict[str, Any]) -> None:
    for name, value in list(body.items()):
        if inspect.isfunction(value) and name in spec.get("methods", {}):
            body[name] = _guarded(f"{original}.{name}", value, tuple(spec["methods"][name]))


def _guarded(name: str, method: Callable[..., Any], overloads: tuple[str, ...]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with LOCK:
            result = method(self, **bind(name, overloads, args, kwargs))
            if name.endswith(".__init__"):
                object.__setattr__(self, "_constructed", True)
            return result

    return call


class Bound(metaclass=BoundMeta):
    """Base of stand-ins: only names that the original has can be read, and only those it lets set can be set."""

    _constructed = False

    @classmethod
    def _made(cls, **state: Any) -> Any:
        """Return an instance of a class without a constructor."""
        self = cls.__new__(cls)
        for name, value in (state | {"_constructed": True}).items():
            object.__setattr__(self, name, value)
        return self

    def __getattr__(self, name: str) -> Any:
        raise missing(type(self), name)

    def __setattr__(self, name: str, value: Any) -> None:
        cls = type(self)
        known = getattr(cls, name, None) if any(name in vars(each) for each in cls.__mro__) else None
        if isinstance(known, property):
            if known.fset is None:
                raise AttributeError(f"property of '{cls.original}' object has no setter: {name}")
            with LOCK:
                known.fset(self, value)
        elif cls.original is None:
            object.__setattr__(self, name, value)  # a Python subclass has a __dict__
        else:
            raise missing(cls, name)


class Enumeration:
    """A pybind11 enumeration: members with a name and a value, no arithmetic, no conversion from numbers."""

    def __init__(self, name: str, value: int) -> None:
        self.name = name
        self.value = value

    def __repr__(self) -> str:
        return f"<{type(self).__name__}.{self.name}: {self.value}>"

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self.name}"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.value == other.value  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash(self.value)

    def __int__(self) -> int:
        return self.value

    __index__ = __int__


def enumeration(original: str) -> Any:
    """Return the stand-in for an enumeration, with the members of the real one."""
    cls: Any = type(original.rpartition(".")[2], (Enumeration,), {"__module__": HOME, "__qualname__": original})
    members = {name: cls(name, value) for name, value in _find(original)["members"].items()}
    for name, member in members.items():
        setattr(cls, name, member)
    cls.__members__ = members
    CLASSES[original] = CLASSES[original.rpartition(".")[2]] = cls
    return cls
