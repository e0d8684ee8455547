"""How a field of a request is declared, and what follows from the declaration: options, ranges, records, a JSON schema.

`Request` declares each of its fields once, with `setting`. Nothing here imports numpy: ``--help`` is made of it.
"""

__all__ = [
    "Setting",
    "Stage",
    "check_settings",
    "dataclass_of_settings",
    "defaults",
    "record_fields",
    "setting",
    "settings_of",
]

import math
from _thread import allocate_lock
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from operator import or_
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from sdxl_trt.engines import UsageError

Stage = Literal["all", "base", "refiner", "handoff", "score"]


class Setting:
    """A field of a request: the one declaration that its option, range, record and schema are derived from.

    Not a dataclass: making one of so many fields would take a third of the time of ``--help``. Raises TypeError for an
    attribute that is not declared here.
    """

    name: str = ""
    type: Any = None
    default: Any = None
    help: str = ""
    unit: str = ""

    # Range.
    low: float | None = None
    high: float | None = None
    without: Literal["", "low", "both"] = ""
    """The ends that the range does not include."""
    model_range: bool = False
    """Whether the range depends on the model and is checked with it; `low` is then for the schema and records."""
    longest: int = 0
    """The most characters of a text, or 0 for any number."""
    choices: tuple[str, ...] = ()
    advice: str = ""
    """What to choose, if the range or the choices do not say it well."""

    # Command line: an option of `group`, or none without one.
    group: str = ""
    option: str = ""
    """The option, if it is not the name: ``--guidance-rescale``."""
    metavar: str = ""
    more_help: str = ""
    """What only the command's help adds."""
    parse: Callable[[str], Any] | None = None
    """Reads the option's text, or raises UsageError; None reads the setting's type."""
    const: Any = ...
    """The value of an option that takes no text; ``...`` for one that takes text."""
    exclusive: str = ""
    """Options with the same word here exclude each other."""
    is_file: bool = False
    """Whether the option names a file that holds the value."""
    several: bool = False
    """Whether the option may be given several times; its value is a tuple of all, in order."""
    unstated: bool = False
    """Whether an option that is left out is None to the command, which has to know that."""

    stage: Stage = "all"
    """What it concerns. Requests share a base run if they differ only in settings of the "refiner", in those of the
    "handoff" if the base can stop at any step, and in a "score" if the base does not read one."""
    sweep: str = ""
    """What ``--sweep`` calls its values, or "" if it cannot be swept."""
    sweeps_none: bool = False
    """Whether a sweep accepts ``none``, the base alone."""
    on_sheet: bool = False
    """Whether a contact sheet records it as requested: its cells may have values of their own."""
    workflow: Literal["states", "reads", "beside", "replaces"] = "states"
    """Whether a ComfyUI workflow states it ("reads": but graphs written here cannot), or it is given "beside" a
    workflow, or "replaces" what the workflow states."""
    several_runs: bool = True
    """Whether it may be given beside a workflow that takes several runs."""
    record: Literal["always", "changed", "workflow", "own", "no"] = "changed"
    """Whether a picture's record keeps it always, if it differs from its default, in a form of its own, or not at all;
    a "workflow" setting that differs marks the picture as one that only its graph can repeat."""
    resolved: Callable[[Any], Any] | None = None
    """Its value in a ResolvedRequest, for a record that keeps it always; None: the request's own."""
    repeats: bool | None = None
    """Whether ``--from`` takes it from the record; None: if that keeps it always or changed."""
    record_none: bool = False
    """Whether a record that keeps it always may hold None."""
    node: str = ""
    """What a ComfyUI node calls it, in errors about a workflow."""
    follows: str = ""
    """The setting whose value it takes if it is None."""

    def __init__(self, **declared: Any) -> None:
        if unknown := declared.keys() - self.__annotations__.keys():
            raise TypeError(f"a setting has no {', '.join(sorted(unknown))}")
        vars(self).update(declared)

    def but(self, **changed: Any) -> "Setting":
        """Return the same declaration with some attributes changed."""
        return Setting(**vars(self) | changed)

    @property
    def word(self) -> str:
        """Return the option as a user types it."""
        return self.option or f"--{self.key}"

    @property
    def key(self) -> str:
        """Return the name with hyphens, as ``--sweep`` and options have it."""
        return self.name.replace("_", "-")

    @property
    def is_repeated(self) -> bool:
        """Return whether ``--from`` takes it from a picture's record."""
        return self.record in ("always", "changed") if self.repeats is None else self.repeats

    def is_default(self, value: Any) -> bool:
        """Return whether `value` is the default; arrays and records are compared by identity."""
        return value is self.default if isinstance(self.type, str) else bool(value == self.default)

    def check(self, value: Any) -> None:
        """Raise UsageError if `value` is outside the declared range or choices; None never is."""
        if value is None:
            return
        if self.choices and value not in self.choices:
            raise UsageError(f"{self.word} {value!r} is unknown; choose one of: {', '.join(self.choices)}")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not self._holds(number):
                raise UsageError(f"{self.word} {number}: {self.advice or self._range(number)}")

    def _holds(self, number: float) -> bool:
        if self.model_range or isinstance(number, bool):
            return True
        low = self.low is None or (number > self.low if self.without else number >= self.low)
        high = self.high is None or (number < self.high if self.without == "both" else number <= self.high)
        return low and high and not (isinstance(number, float) and not math.isfinite(number))

    def _range(self, number: float) -> str:
        if self.low is None or (isinstance(number, float) and not math.isfinite(number)):
            return "give a finite number"
        return f"choose {self.low} or more" if self.high is None else f"choose {self.low} to {self.high}"


def setting(default: Any, **declared: Any) -> Any:
    """Return the declaration of a field, which stands as its default in the class body."""
    return Setting(default=default, **declared)


def settings_of(kind: type) -> Mapping[str, Setting]:
    """Return the settings that `kind` declares, by name, in their order."""
    found: Mapping[str, Setting] = vars(kind)["__settings__"]
    return found


def dataclass_of_settings(kind: type) -> type:
    """Make `kind`, whose fields are declared by `setting`, a frozen dataclass as soon as it has an instance.

    Importing dataclasses takes a fifth of the time of ``--help``, which only reads the declarations.
    """
    types = vars(kind)["__annotations__"]
    found = {name: declared.but(name=name, type=types[name])
             for name, declared in vars(kind).items() if isinstance(declared, Setting)}  # fmt: skip

    lock = allocate_lock()

    def make(self: Any, *values: Any, **named: Any) -> None:
        from dataclasses import dataclass  # noqa: PLC0415 - see above

        with lock:
            if kind.__init__ is make:  # type: ignore[misc]
                for name, each in found.items():
                    setattr(kind, name, each.default)
                del kind.__init__  # type: ignore[misc]
                dataclass(frozen=True)(kind)
        self.__init__(*values, **named)

    def restore(self: object, state: dict[str, Any]) -> None:
        """Unpickle in a process that has made no instance yet: pickle calls no `__init__`."""
        if kind.__init__ is make:  # type: ignore[misc]
            kind()
        vars(self).update(state)

    kind.__init__ = make  # type: ignore[misc]
    kind.__setstate__ = restore  # type: ignore[attr-defined]
    kind.__settings__ = found  # type: ignore[attr-defined]
    return kind


def defaults(chosen: Iterable[Setting]) -> dict[str, Any]:
    """Return the defaults of settings by name."""
    return {each.name: each.default for each in chosen}


def check_settings(request: Any) -> None:
    """Raise UsageError for the first setting of `request` that is outside its declared range or choices."""
    for each in settings_of(request.__class__).values():
        each.check(getattr(request, each.name))


def record_fields(
    chosen: Iterable[Setting], limits: Mapping[type, Mapping[str, Any]] | None = None
) -> list[tuple[str, Any, Any]]:
    """Return (name, type, default) of each setting that JSON has a type for, as `msgspec.defstruct` takes them.

    A type carries the declared range and help; `limits` are the arguments of `msgspec.Meta` for types without a range.
    """
    return [(each.name, _typed(each, limits or {}), each.default) for each in chosen if not isinstance(each.type, str)]


def _typed(declared: Setting, limits: Mapping[type, Mapping[str, Any]]) -> Any:
    import msgspec  # noqa: PLC0415 - --help must not wait for it

    least, most = "gt" if declared.without else "ge", "lt" if declared.without == "both" else "le"
    # msgspec compares with 64-bit integers; a larger bound is in the schema, and checked with the request.
    bounds = {name: bound for name, bound in ((least, declared.low), (most, declared.high))
              if bound is not None and bound < 2**63}  # fmt: skip

    def limited(kind: Any) -> Any:
        if get_origin(kind) is tuple:
            return tuple[tuple(map(limited, get_args(kind)))]  # type: ignore[misc]
        if kind is str and declared.choices:
            return Literal[declared.choices]
        longest = {"max_length": declared.longest} if kind is str and declared.longest else {}
        stated = longest or (bounds if kind in (int, float) else {}) or limits.get(kind, {})
        return Annotated[kind, msgspec.Meta(**stated)] if stated else kind

    is_union = get_origin(declared.type) in (Union, UnionType)
    members = get_args(declared.type) if is_union else (declared.type,)
    whole: Any = reduce(or_, map(limited, members))
    extra: dict[str, Any] = {"x-unit": declared.unit} if declared.unit else {}
    extra |= {"maximum": declared.high} if declared.high and declared.high >= 2**63 else {}
    return Annotated[whole, msgspec.Meta(description=declared.help, extra_json_schema=extra or None)]
