"""The pool loads what a phase needs, ahead of time if allowed; under `swap` the UNets never share memory."""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from sdxl_trt.engines.adapters.scaled import Adapted
from sdxl_trt.engines.bundle.bundle import Bundle
from sdxl_trt.engines.bundle.manifest import Component
from sdxl_trt.engines.bundle.profile import Range
from sdxl_trt.engines.engine import Array, Engine
from sdxl_trt.engines.errors import CorruptError, EngineError, IncompatibleError, ResourceError
from sdxl_trt.engines.plans.limits import PlanLimits
from sdxl_trt.engines.plans.shapes import RunSizes
from sdxl_trt.engines.residency.estimate import MemoryEstimate, PhaseEstimate
from sdxl_trt.engines.residency.needs import Need
from sdxl_trt.engines.residency.pool import EnginePool

NAMES = ("text_encoder", "unet", "refiner_unet", "vae_decoder")
UNETS = ("unet", "refiner_unet")
RUN = tuple(zip(NAMES, (*NAMES[1:], ""), strict=True))
GB = 10**9
WAIT = 20
"""Seconds after which a thread counts as stuck; a passing test never waits that long."""


class Machine:
    """Counts the engines that are loaded at once; `events` lists all events in order, of every thread.

    `errors` maps an event to the error that it raises. `hold` blocks an event until the test releases it.
    """

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.most_unets = 0
        self.events: list[str] = []
        self.threads: dict[str, str] = {}
        self.errors: dict[str, Exception] = {}
        self.hold: dict[str, threading.Event] = {}
        self.budgets: dict[str, int] = {}

    def make(self, name: str, weight_budget: int | None = None) -> Engine:
        if weight_budget is not None:
            self.budgets[name] = weight_budget
        return FakeEngine(name, self)

    def happens(self, event: str) -> None:
        if event in self.hold:
            assert self.hold[event].wait(WAIT), f"the test did not release {event}"
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
    return lambda residency, **options: EnginePool(bundle, machine.make, residency, "fake", **options)


def run(pool: EnginePool, pictures: int = 1) -> None:
    """Run a request through all phases, with all pictures in each."""
    for name, after in RUN:
        (engine,) = pool.phase(name, next_engines=(after,) if after else ())
        for _ in range(pictures):
            engine.infer({})


def test_nothing_is_loaded_before_a_phase(make_pool, machine: Machine) -> None:
    with make_pool("resident"):
        assert machine.events == []


@pytest.mark.parametrize("residency", ["swap", "stream"])
def test_swap_never_holds_two_unets(make_pool, machine: Machine, residency: str) -> None:
    with make_pool(residency) as pool:
        for name, _ in RUN * 2:
            (engine,) = pool.phase(name)
            assert engine.name == name
            assert machine.loaded == [name]
    assert machine.most_unets == 1
    assert machine.loaded == []
    assert pool.loads == [name for name, _ in RUN * 2]


def test_resident_loads_each_engine_once(make_pool, machine: Machine) -> None:
    with make_pool("resident") as pool:
        engines = [pool.phase(name) for name in NAMES]
        assert [pool.phase(name) for name in NAMES] == engines
        assert machine.loaded == list(NAMES)
    assert machine.loaded == []
    assert pool.loads == list(NAMES)
    assert pool.swaps == 0


def test_small_components_are_freed_and_the_unets_stay(make_pool, machine: Machine) -> None:
    with make_pool("resident", keeps=UNETS) as pool:
        run(pool)
        assert sorted(machine.loaded) == ["refiner_unet", "unet", "vae_decoder"]
        run(pool)
        assert pool.loads.count("unet") == pool.loads.count("refiner_unet") == 1
        assert pool.loads.count("text_encoder") == 2


@pytest.mark.parametrize("residency", ["resident", "swap"])
def test_a_phase_may_use_several_engines_and_keeps_them(make_pool, machine: Machine, residency: str) -> None:
    with make_pool(residency) as pool:
        assert [engine.name for engine in pool.phase("text_encoder", "unet")] == ["text_encoder", "unet"]
        pool.phase("unet")
    assert machine.events.count("load unet") == 1


def test_swap_frees_before_it_loads(make_pool, machine: Machine) -> None:
    with make_pool("swap") as pool:
        pool.phase("unet")
        pool.phase("refiner_unet")
        assert machine.events == ["load unet", "unload unet", "load refiner_unet"]


@pytest.mark.parametrize("pictures", [1, 8, 100])
@pytest.mark.parametrize("residency", ["swap", "stream"])
def test_a_request_swaps_unets_once_however_many_pictures(make_pool, residency: str, pictures: int) -> None:
    with make_pool(residency) as pool:
        run(pool, pictures)
        assert pool.swaps == 1
        run(pool, pictures)
        assert pool.swaps == 3, "to the base and to the refiner again"


def test_under_swap_a_thread_reads_the_next_plan_while_this_one_runs(make_pool, machine: Machine) -> None:
    machine.hold["prefetch refiner_unet"] = threading.Event()
    with make_pool("swap") as pool:
        (engine,) = pool.phase("unet", next_engines=("refiner_unet",))
        engine.infer({})  # while the refiner's plan is still being read
        assert "prefetch refiner_unet" not in machine.events
        machine.hold["prefetch refiner_unet"].set()
        pool.phase("refiner_unet")
        assert machine.events == ["load unet", "prefetch refiner_unet", "unload unet", "load refiner_unet"]
    assert machine.threads["prefetch refiner_unet"] != machine.threads["load refiner_unet"]


def test_under_resident_a_thread_loads_the_next_engine_while_this_one_runs(make_pool, machine: Machine) -> None:
    machine.hold["load refiner_unet"] = threading.Event()
    with make_pool("resident") as pool:
        (engine,) = pool.phase("unet", next_engines=("refiner_unet",))
        engine.infer({})
        assert machine.loaded == ["unet"]
        machine.hold["load refiner_unet"].set()
        pool.phase("refiner_unet")
        assert machine.events == ["load unet", "load refiner_unet"]
        assert pool.loads == list(UNETS)
    assert machine.threads["load refiner_unet"] != machine.threads["load unet"]


def test_a_component_that_is_not_kept_is_prefetched_under_resident(make_pool, machine: Machine) -> None:
    with make_pool("resident", keeps=UNETS) as pool:
        pool.phase("refiner_unet", next_engines=("vae_decoder",))
        pool.phase("vae_decoder")
        assert machine.events == ["load refiner_unet", "prefetch vae_decoder", "load vae_decoder"]


def test_a_loaded_engine_is_not_prepared_again(make_pool, machine: Machine) -> None:
    with make_pool("resident") as pool:
        pool.phase(*UNETS)
        pool.phase("unet", next_engines=("refiner_unet",))
        assert machine.events == ["load unet", "load refiner_unet"]


def test_an_unused_prefetch_is_freed(make_pool, machine: Machine) -> None:
    with make_pool("swap") as pool:
        pool.phase("unet", next_engines=("refiner_unet",))
        pool.phase("vae_decoder")
        assert set(machine.events[2:4]) == {"unload unet", "unload refiner_unet"}
        assert machine.events[-1] == "load vae_decoder"


@pytest.mark.parametrize(("residency", "event"), [("swap", "prefetch refiner_unet"), ("resident", "load refiner_unet")])
def test_an_error_of_the_thread_is_raised_by_the_next_phase(
    make_pool, machine: Machine, residency: str, event: str
) -> None:
    machine.errors[event] = CorruptError("the plan is damaged")
    with make_pool(residency) as pool:
        pool.phase("unet", next_engines=("refiner_unet",))
        with pytest.raises(CorruptError, match="the plan is damaged"):
            pool.phase("refiner_unet")
        assert "unload refiner_unet" in machine.events, "the engine is freed"
        machine.errors.clear()
        pool.phase("refiner_unet")
        assert "refiner_unet" in machine.loaded


def test_an_error_that_no_phase_can_raise_is_logged(
    make_pool, machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.errors["prefetch refiner_unet"] = CorruptError("the plan is damaged")
    with make_pool("swap") as pool:
        pool.phase("unet", next_engines=("refiner_unet",))
    assert [record.getMessage() for record in caplog.records] == ["the plan is damaged"]
    assert machine.loaded == []


def test_a_plan_that_cannot_be_prefetched_is_read_in_its_phase(
    make_pool, machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.errors["prefetch refiner_unet"] = ResourceError("out of host memory")
    with make_pool("swap", fallbacks=("stream",)) as pool:
        pool.phase("unet", next_engines=("refiner_unet",))
        pool.phase("refiner_unet")
        assert machine.loaded == ["refiner_unet"]
        assert pool.residency == "swap"
    assert caplog.messages == ["refiner_unet was not read ahead: out of host memory"]


@pytest.mark.parametrize("residency", ["resident", "swap"])
def test_closing_a_pool_waits_for_its_thread(make_pool, machine: Machine, residency: str) -> None:
    event = "load refiner_unet" if residency == "resident" else "prefetch refiner_unet"
    machine.hold[event] = threading.Event()
    with pytest.raises(RuntimeError, match="stop"), make_pool(residency) as pool:  # noqa: PT012
        pool.phase("unet", next_engines=("refiner_unet",))
        machine.hold[event].set()
        raise RuntimeError("stop")
    assert machine.loaded == []
    assert "unload refiner_unet" in machine.events


def test_engines_are_freed_after_an_error(make_pool, machine: Machine) -> None:
    with pytest.raises(RuntimeError, match="stop"), make_pool("resident") as pool:  # noqa: PT012
        pool.phase("unet", "refiner_unet")
        raise RuntimeError("stop")
    assert machine.loaded == []


def test_a_failing_unload_still_frees_the_others_and_the_device(
    make_pool, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []
    pool = make_pool("resident", close=lambda: closed.append("device"))
    engines = pool.phase(*NAMES)

    def refuse() -> None:
        raise EngineError("the device is lost")

    monkeypatch.setattr(engines[1], "unload", refuse)
    with pytest.raises(EngineError, match="the device is lost"):
        pool.close()
    assert machine.loaded == ["unet"]
    assert closed == ["device"]


def test_an_engine_can_be_loaded_after_a_failed_load(make_pool, machine: Machine) -> None:
    machine.errors["load unet"] = EngineError("loading unet")
    with make_pool("resident") as pool:
        with pytest.raises(EngineError):
            pool.phase("unet")
        assert machine.events == ["unload unet"], "the engine is freed"
        machine.errors.clear()
        pool.phase("unet")
        assert pool.loads == ["unet"]


class Full(Machine):
    """A device with room for `room` engines; if `streamed`, a UNet fits only with a weight budget."""

    def __init__(self, room: int, streamed: bool = False) -> None:
        super().__init__()
        self.room, self.streamed = room, streamed

    def happens(self, event: str) -> None:
        name = event.removeprefix("load ")
        if event.startswith("load"):
            small = name not in UNETS or not self.streamed or name in self.budgets
            if len(self.loaded) >= self.room or not small:
                raise ResourceError(f"loading {name}: out of memory")
        super().happens(event)


@pytest.mark.parametrize("ahead", [True, False])
def test_out_of_memory_under_resident_continues_with_swap(
    bundle: Bundle, ahead: bool, caplog: pytest.LogCaptureFixture
) -> None:
    machine = Full(room=1)
    with EnginePool(bundle, machine.make, "resident", "fake", keeps=UNETS, fallbacks=("swap", "stream")) as pool:
        pool.phase("unet", next_engines=("refiner_unet",) if ahead else ())
        pool.phase("refiner_unet", next_engines=("vae_decoder",))
        assert (pool.residency, machine.loaded, pool.swaps) == ("swap", ["refiner_unet"], 1)
        run(pool)
        assert machine.most_unets == 1
    expected = "residency resident: loading refiner_unet: out of memory; continuing with swap"
    assert caplog.messages == [expected]
    assert caplog.records[0].levelno == logging.WARNING


def test_out_of_memory_under_swap_continues_with_stream(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    machine = Full(room=1, streamed=True)
    budgets = {"unet": 700, "refiner_unet": 600}
    with EnginePool(bundle, machine.make, "resident", "fake", fallbacks=("swap", "stream"), budgets=budgets) as pool:
        run(pool)
        assert (pool.residency, machine.budgets) == ("stream", budgets)
        assert pool.swaps == 1
    assert len(caplog.messages) == 2
    assert machine.loaded == []


def test_an_engine_loaded_whole_is_loaded_again_with_its_budget(bundle: Bundle) -> None:
    class Tight(Machine):
        def happens(self, event: str) -> None:
            if event == "load refiner_unet" and "refiner_unet" not in self.budgets:
                raise ResourceError("out of memory")
            super().happens(event)

    machine, budgets = Tight(), {"unet": 700, "refiner_unet": 600}
    with EnginePool(bundle, machine.make, "swap", "fake", fallbacks=("stream",), budgets=budgets) as pool:
        pool.phase(*UNETS)
        assert machine.budgets == budgets
        assert machine.events[:2] == ["load unet", "unload refiner_unet"]
        assert machine.loaded == list(UNETS)


@pytest.mark.parametrize("fallbacks", [(), ("swap",), ("swap", "stream")])
def test_out_of_memory_under_the_last_policy_is_an_error(bundle: Bundle, fallbacks: tuple[str, ...]) -> None:
    machine = Full(room=0)
    pool = EnginePool(bundle, machine.make, "resident", "fake", fallbacks=fallbacks)
    with pool, pytest.raises(ResourceError, match="loading unet: out of memory"):
        pool.phase("unet")
    assert machine.loaded == []


def test_a_replacement_runs_under_the_name_of_the_original(make_pool, machine: Machine) -> None:
    with make_pool("swap", replaced={"text_encoder": "vae_decoder"}) as pool:
        pool.phase("unet", next_engines=("text_encoder",))
        (engine,) = pool.phase("text_encoder")
        assert engine.name == "vae_decoder"
        pool.free(keep=("text_encoder",))
        assert machine.loaded == ["vae_decoder"]
    assert pool.loads == ["unet", "vae_decoder"]


def _estimates(fits: dict[str, int], usual: int = 5) -> Callable[..., MemoryEstimate]:
    """Return a stand-in for `estimate_memory`, exact figures on a device of 10 GB: the peak of each residency."""

    def estimate(*, residency: str, run: RunSizes | None = None, controls: Sequence[str] = ()) -> MemoryEstimate:
        assert not controls
        peak = GB * (usual if run is None else fits[residency])
        phase = PhaseEstimate(name="base", components=("unet",), loaded=("unet",), peak=peak)
        return MemoryEstimate(
            provider="tensorrt", capacity=10 * GB, usable=9 * GB, residency=residency, reason="", needs=(),
            phases=(phase,), peak=peak, keeps=UNETS if residency == "resident" else (), missing=max(peak - 9 * GB, 0),
        )  # fmt: skip

    return estimate


RECORDS = {"unet": SimpleNamespace(file=SimpleNamespace(size=1))}
RUN_SIZES = RunSizes(height=512, width=768, rows=2, tokens=154)
SIDES = Range(min=512, opt=1024, max=1280)
LIMITS = PlanLimits(height=SIDES, width=SIDES, pictures=1, tokens=Range(min=77, opt=77, max=231))


@pytest.mark.parametrize(
    ("peaks", "residency", "left"),
    [((9, 8, 7), "resident", ("swap", "stream")), ((10, 9, 7), "swap", ("stream",)), ((30, 20, 9), "stream", ())],
)
def test_a_run_gets_the_first_residency_that_it_fits(
    make_pool, machine: Machine, peaks: tuple[int, ...], residency: str, left: tuple[str, ...]
) -> None:
    estimate = _estimates(dict(zip(("resident", "swap", "stream"), peaks, strict=True)))
    options = {"fallbacks": ("swap", "stream"), "estimate": estimate, "records": RECORDS, "limits": LIMITS}
    with make_pool("resident", **options) as pool:
        pool.phase("vae_decoder")
        pool.make_room(RUN_SIZES)
        assert (pool.residency, pool._fallbacks) == (residency, left)
        assert machine.loaded == ["vae_decoder"]  # another run may be using it
        pool.phase("unet")
        # The run fits only if the small components are freed.
        assert machine.loaded == ["unet"]


def test_what_a_run_needs_is_reserved_when_its_engines_load(make_pool, machine: Machine) -> None:
    """So memory that other programs hold is missed while the pool can still fall back."""
    need = Need(component="unet", weights=0, activations=700, largest=700, io=0)
    estimate = _estimates({"resident": 5, "swap": 5})

    def with_need(**options: Any) -> MemoryEstimate:
        return msgspec.structs.replace(estimate(**options), needs=(need,))

    options = {"fallbacks": ("swap",), "estimate": with_need, "records": RECORDS, "limits": LIMITS}
    with make_pool("resident", activations={"unet": 300}, **options) as pool:
        pool.phase("unet")
        assert machine.events[-2:] == ["load unet", "reserve 300 for unet"]
        pool.make_room(RUN_SIZES)
        pool.free()
        machine.errors["reserve 700 for unet"] = ResourceError("out of memory")
        with pytest.raises(ResourceError):
            pool.phase("unet")
        assert pool.residency == "swap"
        assert machine.loaded == []


def test_a_smaller_budget_takes_effect_with_the_next_phase(make_pool, machine: Machine) -> None:
    """A loaded engine cannot change its budget, and until then another run may use it."""
    estimate = _estimates({"stream": 5})

    def with_budget(**options: Any) -> MemoryEstimate:
        return msgspec.structs.replace(estimate(**options), budgets={"unet": 20})

    options = {"budgets": {"unet": 50}, "estimate": with_budget, "records": RECORDS, "limits": LIMITS}
    with make_pool("stream", **options) as pool:
        pool.phase("unet")
        pool.make_room(RUN_SIZES)
        assert (machine.loaded, machine.budgets) == (["unet"], {"unet": 50})
        pool.phase("unet")
        assert (machine.loaded, machine.budgets) == (["unet"], {"unet": 20})


def test_room_is_checked_without_any_change(make_pool, machine: Machine) -> None:
    """Another thread may do so while a run goes on."""
    options = {"fallbacks": ("swap",), "estimate": _estimates({"resident": 12, "swap": 8}), "records": RECORDS}
    with make_pool("resident", limits=LIMITS, **options) as pool:
        pool.phase("unet")
        pool.check_room(RUN_SIZES)
        assert (pool.residency, pool._fallbacks, machine.loaded) == ("resident", ("swap",), ["unet"])
        pool.make_room(RUN_SIZES)
        assert pool.residency == "swap"


def test_the_loads_that_a_pool_remembers_are_bounded(
    make_pool, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdxl_trt.engines.residency.pool.MOST_LOADS", 3)
    with make_pool("swap") as pool:
        for _ in range(3):
            pool.phase("unet")
            pool.phase("vae_decoder")
        assert pool.loads == ["vae_decoder", "unet", "vae_decoder"]


def test_a_run_that_fits_nowhere_is_refused_with_the_size_that_fits(make_pool, machine: Machine) -> None:
    options = {"estimate": _estimates({"swap": 12}), "records": RECORDS, "limits": LIMITS}
    with make_pool("swap", **options) as pool, pytest.raises(ResourceError) as raised:
        pool.make_room(RUN_SIZES)
    with make_pool("swap", **options) as pool, pytest.raises(ResourceError, match=r"needs 7\.00 GB less"):
        pool.check_room(RUN_SIZES)
    assert str(raised.value) == (
        "768x512 with 154 tokens: tensorrt, residency swap: base needs 12.00 GB, 3.00 GB more than the 9.00 GB"
        " that is usable; the plans' usual size, 1024x1024 with 77 tokens, needs 7.00 GB less"
    )
    options["estimate"] = _estimates({"swap": 12}, usual=11)
    with make_pool("swap", **options) as pool, pytest.raises(ResourceError, match="usable; build the plans with"):
        pool.make_room(RUN_SIZES)
    assert machine.events == []


def test_without_plans_nothing_is_refused(make_pool) -> None:
    with make_pool("swap", estimate=_estimates({"swap": 12})) as pool:
        pool.make_room(RUN_SIZES)


LORAS = (("style", 0.8),)
"""What a pool hands through: it compares LoRAs, and does not look into them."""


def _worn(component: str, *loras: Any) -> Adapted:
    return Adapted(component, loras or LORAS)


@pytest.mark.parametrize("residency", ["resident", "swap"])
def test_other_loras_replace_a_unet_instead_of_joining_it(make_pool, machine: Machine, residency: str) -> None:
    with make_pool(residency) as pool:
        pool.phase("unet")
        pool.phase(_worn("unet"))
        pool.phase(_worn("unet", ("other", 1.0)))
        pool.phase("unet")
        assert pool.loads == ["unet"] * 4
        assert pool.swaps == 0
    assert machine.most_unets == 1


def test_equal_loras_load_nothing(make_pool, machine: Machine) -> None:
    with make_pool("resident") as pool:
        (first,) = pool.phase(_worn("unet"))
        pool.phase("text_encoder")
        (again,) = pool.phase(_worn("unet"))
        assert first is again
        assert pool.loads == ["unet", "text_encoder"]
        assert pool.holds(_worn("unet"))
        assert not pool.holds("unet")
        assert pool.holds("text_encoder")


def test_only_the_components_that_changed_are_loaded_again(make_pool, machine: Machine) -> None:
    with make_pool("resident") as pool:
        run(pool)
        before = len(pool.loads)
        pool.phase("text_encoder")
        pool.phase(_worn("unet"))
        pool.phase("refiner_unet")
        pool.phase("vae_decoder")
        assert pool.loads[before:] == ["unet"]


def test_an_engine_is_adapted_before_anything_of_it_is_read(make_pool, machine: Machine) -> None:
    with make_pool("swap") as pool:
        pool.phase("text_encoder", next_engines=(_worn("unet"),))
        (engine,) = pool.phase(_worn("unet"))
        assert engine.loras == LORAS
    wanted = [event for event in machine.events if event.split()[0] in {"adapt", "prefetch", "load"}]
    assert [event.split()[0] for event in wanted if " unet" in event] == ["adapt", "prefetch", "load"]


def test_what_was_read_ahead_for_other_loras_gets_those_of_the_phase(make_pool) -> None:
    with make_pool("swap") as pool:
        pool.phase("text_encoder", next_engines=(_worn("unet"),))
        (engine,) = pool.phase("unet")
        assert engine.loras == ()


def test_loras_that_do_not_fit_leave_the_engine_as_it_was(make_pool, machine: Machine) -> None:
    with make_pool("resident") as pool:
        pool.phase("unet")
        machine.errors["adapt unet ('style', 0.8)"] = CorruptError("another model")
        with pytest.raises(CorruptError, match="another model"):
            pool.phase(_worn("unet"))
        assert pool.holds("unet")
        assert pool.phase("unet")
        assert pool.loads == ["unet"]


def test_loras_that_do_not_fit_are_refused_before_a_phase(make_pool, machine: Machine) -> None:
    with make_pool("resident") as pool:
        pool.phase("unet")
        machine.errors["adapt refiner_unet ('style', 0.8)"] = IncompatibleError("changes a bias")
        pool.check(["unet", _worn("unet")])
        with pytest.raises(IncompatibleError, match="changes a bias"):
            pool.check([_worn("unet"), _worn("refiner_unet")])
        assert pool.holds("unet")
        assert pool.loads == machine.loaded == ["unet"]


def test_an_engine_whose_loras_fail_to_load_is_gone_and_comes_back(make_pool, machine: Machine) -> None:
    with make_pool("resident") as pool:
        pool.phase("unet")
        machine.errors["load unet"] = CorruptError("NaN")
        with pytest.raises(CorruptError, match="NaN"):
            pool.phase(_worn("unet"))
        assert machine.loaded == []
        assert not pool.holds(_worn("unet"))
        machine.errors.clear()
        (engine,) = pool.phase("unet")
        assert engine.loras == ()
        assert machine.loaded == ["unet"]


def test_a_component_with_loras_is_kept_by_either_name(make_pool, machine: Machine) -> None:
    with make_pool("resident") as pool:
        pool.phase(_worn("unet"))
        pool.phase("vae_decoder")
        pool.free(keep=(_worn("unet"),))
        assert machine.loaded == ["unet"]
        pool.free()
        assert machine.loaded == []
