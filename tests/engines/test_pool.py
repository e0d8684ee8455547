"""The pool loads what a phase needs; under `swap` the experts never share memory."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest

from sdxl_trt.engines import pool as pool_module
from sdxl_trt.engines.base import Array, Engine
from sdxl_trt.engines.bundle import Bundle, Component
from sdxl_trt.engines.errors import EngineError, UsageError
from sdxl_trt.engines.pool import EnginePool, open_pool

NAMES = ("text_encoder", "unet", "refiner_unet", "vae_decoder")
RUN = (("text_encoder",), ("unet",), ("refiner_unet",), ("vae_decoder",))


@pytest.fixture
def bundle(component_of: Callable[..., Component], bundle_of: Callable[..., Bundle]) -> Bundle:
    return bundle_of({name: component_of("unet", 1000) for name in NAMES})


class Machine:
    """Counts the engines that are loaded at once; `events` is what happened, in order."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.most_unets = 0
        self.events: list[str] = []
        self.refuse = ""

    def make(self, name: str) -> Engine:
        return FakeEngine(name, self)


class FakeEngine:
    component: Component  # no test asks for it

    def __init__(self, name: str, machine: Machine) -> None:
        self.name, self.machine = name, machine

    def prefetch(self) -> None:
        self.machine.events.append(f"prefetch {self.name}")

    def load(self) -> None:
        if self.machine.refuse == self.name:
            raise EngineError(f"loading {self.name}")
        assert self.name not in self.machine.loaded, "loaded twice"
        self.machine.loaded.append(self.name)
        self.machine.events.append(f"load {self.name}")
        unets = sum(name.endswith("unet") for name in self.machine.loaded)
        self.machine.most_unets = max(self.machine.most_unets, unets)

    def bind(self, constants: Mapping[str, Array]) -> None:
        raise AssertionError("a pool binds nothing")

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        return {"out": np.zeros(1)}

    def unload(self) -> None:
        self.machine.loaded.remove(self.name)
        self.machine.events.append(f"unload {self.name}")


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def make_pool(bundle: Bundle, machine: Machine) -> Callable[[str], EnginePool]:
    return lambda residency: EnginePool(bundle, machine.make, residency, "fake")


def test_nothing_is_loaded_before_a_phase(make_pool, machine: Machine) -> None:
    with make_pool("resident"):
        assert machine.events == []


def test_swap_never_holds_two_unets(make_pool, machine: Machine) -> None:
    with make_pool("swap") as pool:
        for phase in RUN * 2:
            (engine,) = pool.phase(*phase)
            assert engine.name == phase[0]
            assert machine.loaded == list(phase)
    assert machine.most_unets == 1
    assert machine.loaded == []
    assert pool.loads == [name for phase in RUN * 2 for name in phase]


def test_resident_loads_each_engine_once(make_pool, machine: Machine) -> None:
    with make_pool("resident") as pool:
        engines = [pool.phase(*phase) for phase in RUN]
        assert [pool.phase(*phase) for phase in RUN] == engines
        assert machine.loaded == list(NAMES)
    assert machine.loaded == []
    assert pool.loads == list(NAMES)


@pytest.mark.parametrize("residency", ["resident", "swap"])
def test_a_phase_may_hold_several_engines_and_keeps_them(make_pool, machine: Machine, residency: str) -> None:
    with make_pool(residency) as pool:
        assert [engine.name for engine in pool.phase("text_encoder", "unet")] == ["text_encoder", "unet"]
        pool.phase("unet")
    assert machine.events.count("load unet") == 1


def test_swap_frees_before_it_loads(make_pool, machine: Machine) -> None:
    pool = make_pool("swap")
    pool.phase("unet")
    pool.phase("refiner_unet")
    assert machine.events == ["load unet", "unload unet", "load refiner_unet"]


def test_engines_are_freed_when_the_work_fails(make_pool, machine: Machine) -> None:
    with pytest.raises(RuntimeError, match="stop"), make_pool("resident") as pool:  # noqa: PT012
        pool.phase("unet", "refiner_unet")
        raise RuntimeError("stop")
    assert machine.loaded == []


def test_an_engine_that_did_not_load_is_tried_again(make_pool, machine: Machine) -> None:
    machine.refuse = "unet"
    with make_pool("resident") as pool:
        with pytest.raises(EngineError):
            pool.phase("unet")
        machine.refuse = ""
        pool.phase("unet")
        assert pool.loads == ["unet"]


def test_names_that_exist_are_listed(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="unknown provider 'cuda'; choose auto or ort-cpu"):
        open_pool(bundle, provider="cuda")
    with pytest.raises(UsageError, match="unknown residency 'all'; choose auto, resident or swap"):
        open_pool(bundle, residency="all")


def test_the_measured_memory_decides(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    for measured, policy in ((1 << 50, "resident"), (1, "swap"), (None, "resident")):
        monkeypatch.setattr(pool_module, "available_host_memory", lambda measured=measured: measured)
        pool = open_pool(bundle)
        assert (pool.residency, pool.provider) == (policy, "ort-cpu")


@pytest.mark.parametrize(("available", "policy"), [(1, "swap"), (0, "swap"), (1 << 50, "resident")])
def test_a_given_size_replaces_the_measured_one(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, available: int, policy: str
) -> None:
    measured = 1 << 50 if policy == "swap" else 1
    monkeypatch.setattr(pool_module, "available_host_memory", lambda: measured)
    assert open_pool(bundle, available=available).residency == policy
