"""A machine that records which engines a pool loads, and pools on it."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from sdxl_trt.engines.bundle.bundle import Bundle
from sdxl_trt.engines.bundle.manifest import Component
from sdxl_trt.engines.engine import Array, Engine
from sdxl_trt.engines.errors import ResourceError
from sdxl_trt.engines.residency.pool import EnginePool

NAMES = ("text_encoder", "unet", "refiner_unet", "vae_decoder")
UNETS = ("unet", "refiner_unet")
RUN = tuple(zip(NAMES, (*NAMES[1:], ""), strict=True))
WAIT = 20
"""Seconds after which a thread counts as stuck; a passing test never waits that long."""


class Machine:
    """Counts the engines that are loaded at once; `events` lists all events in order, of every thread.

    `errors` maps an event to the error that it raises, and `refuses` says which loads find no memory. `hold` blocks an
    event until the test releases it.
    """

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.most_unets = 0
        self.events: list[str] = []
        self.threads: dict[str, str] = {}
        self.errors: dict[str, Exception] = {}
        self.refuses: Callable[[str], bool] = lambda name: False
        self.hold: dict[str, threading.Event] = {}
        self.budgets: dict[str, int] = {}

    def make(self, name: str, weight_budget: int | None = None) -> Engine:
        if weight_budget is not None:
            self.budgets[name] = weight_budget
        return FakeEngine(name, self)

    def happens(self, event: str) -> None:
        if event in self.hold:
            assert self.hold[event].wait(WAIT), f"the test did not release {event}"
        loads = event.removeprefix("load ")
        if loads != event and self.refuses(loads):
            raise ResourceError(f"loading {loads}: out of memory")
        if event in self.errors:
            raise self.errors[event]
        self.events.append(event)
        self.threads[event] = threading.current_thread().name


class FakeEngine:
    component: Component  # no test uses it

    def __init__(self, name: str, machine: Machine) -> None:
        self.name, self.machine = name, machine
        self.loras: tuple[Any, ...] = ()
        self.loaded = False

    def prefetch(self) -> None:
        self.machine.happens(f"prefetch {self.name}")

    def load(self) -> None:
        self.machine.happens(f"load {self.name}")
        assert self.name not in self.machine.loaded, "loaded twice"
        self.machine.loaded.append(self.name)
        self.loaded = True
        unets = sum(name in UNETS for name in self.machine.loaded)
        self.machine.most_unets = max(self.machine.most_unets, unets)

    def adapt(self, loras: Sequence[Any]) -> None:
        if tuple(loras) != self.loras:
            self.machine.happens(f"adapt {self.name} {' '.join(map(str, loras))}".strip())
            self.loras = tuple(loras)
            if self.loaded:
                self.unload()

    def reserve(self, nbytes: int) -> None:
        self.machine.happens(f"reserve {nbytes} for {self.name}")

    def bind(self, constants: Mapping[str, Array]) -> None:
        raise AssertionError("a pool binds nothing")

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        return {"out": np.zeros(1)}

    def unload(self) -> None:
        self.machine.events.append(f"unload {self.name}")
        if self.name in self.machine.loaded:
            self.machine.loaded.remove(self.name)


@pytest.fixture
def bundle(component_of: Callable[..., Component], bundle_of: Callable[..., Bundle]) -> Bundle:
    kinds = ("text_encoder", "unet", "unet", "vae_decoder")
    return bundle_of({name: component_of(kind, 1000) for name, kind in zip(NAMES, kinds, strict=True)})


@pytest.fixture
def machine() -> Iterator[Machine]:
    before = threading.active_count()
    yield Machine()
    assert threading.active_count() == before, "a thread outlived its pool"


@pytest.fixture
def make_pool(bundle: Bundle, machine: Machine) -> Callable[..., EnginePool]:
    """Return a function that makes a pool of `bundle` on `machine`, from a residency and options."""
    return lambda residency, **options: EnginePool(bundle, machine.make, residency, "fake", **options)


@pytest.fixture
def run() -> Callable[..., None]:
    """Return a function that runs a request through all phases of a pool, with all pictures in each."""

    def through(pool: EnginePool, pictures: int = 1) -> None:
        for name, after in RUN:
            (engine,) = pool.phase(name, next_engines=(after,) if after else ())
            for _ in range(pictures):
                engine.infer({})

    return through
