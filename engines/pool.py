"""Engines of a bundle under a residency policy: loaded when a phase needs them, freed when the policy says so."""

__all__ = ["EnginePool", "Provider", "open_pool"]

from collections.abc import Callable
from types import TracebackType
from typing import Literal, Self

from sdxl_trt.engines.base import Engine
from sdxl_trt.engines.bundle import Bundle
from sdxl_trt.engines.errors import UsageError
from sdxl_trt.engines.memory import Residency, available_host_memory, choose_residency

Provider = Literal["auto", "ort-cpu"]


class EnginePool:
    """Loads and frees the engines of a bundle; a context manager that frees them all.

    `resident` keeps every engine that was loaded. `swap` holds the engines of one phase: before a phase loads its
    own, it frees all others, so that the refiner never shares memory with the base.
    """

    def __init__(self, bundle: Bundle, make: Callable[[str], Engine], residency: Residency, provider: str) -> None:
        self.bundle = bundle
        self.residency = residency
        self.provider = provider
        self._make = make
        self._engines: dict[str, Engine] = {}
        self.loads: list[str] = []
        """The components in the order in which they were loaded."""

    def phase(self, *names: str) -> tuple[Engine, ...]:
        """Return the loaded engines called `names`, having freed the others where the policy swaps."""
        if self.residency == "swap":
            self.free(keep=names)
        return tuple(self._load(name) for name in names)

    def free(self, keep: tuple[str, ...] = ()) -> None:
        """Unload every engine but those to `keep`."""
        for name in [name for name in self._engines if name not in keep]:
            self._engines.pop(name).unload()

    def _load(self, name: str) -> Engine:
        if name not in self._engines:
            engine = self._make(name)
            engine.load()
            self._engines[name] = engine
            self.loads.append(name)
        return self._engines[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.free()


def open_pool(
    bundle: Bundle, provider: str = "auto", residency: str = "auto", available: int | None = None
) -> EnginePool:
    """Return a pool for `bundle`; nothing is loaded yet.

    `provider` is "auto" or "ort-cpu", `residency` "auto", "resident" or "swap"; `available` replaces the measured
    host memory in bytes for "auto". Raises UsageError for other names.
    """
    if provider not in ("auto", "ort-cpu"):
        raise UsageError(f"unknown provider {provider!r}; choose auto or ort-cpu")
    if residency not in ("auto", "resident", "swap"):
        raise UsageError(f"unknown residency {residency!r}; choose auto, resident or swap")
    from sdxl_trt.engines.ort import OrtEngine  # noqa: PLC0415 - one import a provider

    policy = choose_residency(bundle, residency, available_host_memory() if available is None else available)
    return EnginePool(bundle, lambda name: OrtEngine(bundle, name), policy, "ort-cpu")
