"""The pool loads what a phase needs, ahead of time if allowed; under `swap` the UNets never share memory."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from sdxl_trt.engines.errors import CorruptError, EngineError, ResourceError

NAMES = ("text_encoder", "unet", "refiner_unet", "vae_decoder")
UNETS = ("unet", "refiner_unet")
RUN = tuple(zip(NAMES, (*NAMES[1:], ""), strict=True))
Run = Callable[..., None]


def test_nothing_is_loaded_before_a_phase(make_pool, machine: Any) -> None:
    with make_pool("resident"):
        assert machine.events == []


@pytest.mark.parametrize("residency", ["swap", "stream"])
def test_swap_never_holds_two_unets(make_pool, machine: Any, residency: str) -> None:
    with make_pool(residency) as pool:
        for name, _ in RUN * 2:
            (engine,) = pool.phase(name)
            assert engine.name == name
            assert machine.loaded == [name]
    assert machine.most_unets == 1
    assert machine.loaded == []
    assert pool.loads == [name for name, _ in RUN * 2]


def test_resident_loads_each_engine_once(make_pool, machine: Any) -> None:
    with make_pool("resident") as pool:
        engines = [pool.phase(name) for name in NAMES]
        assert [pool.phase(name) for name in NAMES] == engines
        assert machine.loaded == list(NAMES)
    assert machine.loaded == []
    assert pool.loads == list(NAMES)
    assert pool.swaps == 0


def test_small_components_are_freed_and_the_unets_stay(make_pool, machine: Any, run: Run) -> None:
    with make_pool("resident", keeps=UNETS) as pool:
        run(pool)
        assert sorted(machine.loaded) == ["refiner_unet", "unet", "vae_decoder"]
        run(pool)
        assert pool.loads.count("unet") == pool.loads.count("refiner_unet") == 1
        assert pool.loads.count("text_encoder") == 2


@pytest.mark.parametrize("residency", ["resident", "swap"])
def test_a_phase_may_use_several_engines_and_keeps_them(make_pool, machine: Any, residency: str) -> None:
    with make_pool(residency) as pool:
        assert [engine.name for engine in pool.phase("text_encoder", "unet")] == ["text_encoder", "unet"]
        pool.phase("unet")
    assert machine.events.count("load unet") == 1


def test_swap_frees_before_it_loads(make_pool, machine: Any) -> None:
    with make_pool("swap") as pool:
        pool.phase("unet")
        pool.phase("refiner_unet")
        assert machine.events == ["load unet", "unload unet", "load refiner_unet"]


@pytest.mark.parametrize("pictures", [1, 8, 100])
@pytest.mark.parametrize("residency", ["swap", "stream"])
def test_a_request_swaps_unets_once_however_many_pictures(make_pool, residency: str, pictures: int, run: Run) -> None:
    with make_pool(residency) as pool:
        run(pool, pictures)
        assert pool.swaps == 1
        run(pool, pictures)
        assert pool.swaps == 3, "to the base and to the refiner again"


def test_under_swap_a_thread_reads_the_next_plan_while_this_one_runs(make_pool, machine: Any) -> None:
    machine.hold["prefetch refiner_unet"] = threading.Event()
    with make_pool("swap") as pool:
        (engine,) = pool.phase("unet", next_engines=("refiner_unet",))
        engine.infer({})  # while the refiner's plan is still being read
        assert "prefetch refiner_unet" not in machine.events
        machine.hold["prefetch refiner_unet"].set()
        pool.phase("refiner_unet")
        assert machine.events == ["load unet", "prefetch refiner_unet", "unload unet", "load refiner_unet"]
    assert machine.threads["prefetch refiner_unet"] != machine.threads["load refiner_unet"]


def test_under_resident_a_thread_loads_the_next_engine_while_this_one_runs(make_pool, machine: Any) -> None:
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


def test_a_component_that_is_not_kept_is_prefetched_under_resident(make_pool, machine: Any) -> None:
    with make_pool("resident", keeps=UNETS) as pool:
        pool.phase("refiner_unet", next_engines=("vae_decoder",))
        pool.phase("vae_decoder")
        assert machine.events == ["load refiner_unet", "prefetch vae_decoder", "load vae_decoder"]


def test_a_loaded_engine_is_not_prepared_again(make_pool, machine: Any) -> None:
    with make_pool("resident") as pool:
        pool.phase(*UNETS)
        pool.phase("unet", next_engines=("refiner_unet",))
        assert machine.events == ["load unet", "load refiner_unet"]


def test_an_unused_prefetch_is_freed(make_pool, machine: Any) -> None:
    with make_pool("swap") as pool:
        pool.phase("unet", next_engines=("refiner_unet",))
        pool.phase("vae_decoder")
        assert set(machine.events[2:4]) == {"unload unet", "unload refiner_unet"}
        assert machine.events[-1] == "load vae_decoder"


@pytest.mark.parametrize(("residency", "event"), [("swap", "prefetch refiner_unet"), ("resident", "load refiner_unet")])
def test_an_error_of_the_thread_is_raised_by_the_next_phase(
    make_pool, machine: Any, residency: str, event: str
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


def test_an_error_that_no_phase_can_raise_is_logged(make_pool, machine: Any, caplog: pytest.LogCaptureFixture) -> None:
    machine.errors["prefetch refiner_unet"] = CorruptError("the plan is damaged")
    with make_pool("swap") as pool:
        pool.phase("unet", next_engines=("refiner_unet",))
    assert [record.getMessage() for record in caplog.records] == ["the plan is damaged"]
    assert machine.loaded == []


def test_a_plan_that_cannot_be_prefetched_is_read_in_its_phase(
    make_pool, machine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    machine.errors["prefetch refiner_unet"] = ResourceError("out of host memory")
    with make_pool("swap", fallbacks=("stream",)) as pool:
        pool.phase("unet", next_engines=("refiner_unet",))
        pool.phase("refiner_unet")
        assert machine.loaded == ["refiner_unet"]
        assert pool.residency == "swap"
    assert caplog.messages == ["refiner_unet was not read ahead: out of host memory"]


@pytest.mark.parametrize("residency", ["resident", "swap"])
def test_closing_a_pool_waits_for_its_thread(make_pool, machine: Any, residency: str) -> None:
    event = "load refiner_unet" if residency == "resident" else "prefetch refiner_unet"
    machine.hold[event] = threading.Event()
    with pytest.raises(RuntimeError, match="stop"), make_pool(residency) as pool:  # noqa: PT012
        pool.phase("unet", next_engines=("refiner_unet",))
        machine.hold[event].set()
        raise RuntimeError("stop")
    assert machine.loaded == []
    assert "unload refiner_unet" in machine.events


def test_engines_are_freed_after_an_error(make_pool, machine: Any) -> None:
    with pytest.raises(RuntimeError, match="stop"), make_pool("resident") as pool:  # noqa: PT012
        pool.phase("unet", "refiner_unet")
        raise RuntimeError("stop")
    assert machine.loaded == []


def test_a_failing_unload_still_frees_the_others_and_the_device(
    make_pool, machine: Any, monkeypatch: pytest.MonkeyPatch
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


def test_an_engine_can_be_loaded_after_a_failed_load(make_pool, machine: Any) -> None:
    machine.errors["load unet"] = EngineError("loading unet")
    with make_pool("resident") as pool:
        with pytest.raises(EngineError):
            pool.phase("unet")
        assert machine.events == ["unload unet"], "the engine is freed"
        machine.errors.clear()
        pool.phase("unet")
        assert pool.loads == ["unet"]


def test_a_replacement_runs_under_the_name_of_the_original(make_pool, machine: Any) -> None:
    with make_pool("swap", replaced={"text_encoder": "vae_decoder"}) as pool:
        pool.phase("unet", next_engines=("text_encoder",))
        (engine,) = pool.phase("text_encoder")
        assert engine.name == "vae_decoder"
        pool.free(keep=("text_encoder",))
        assert machine.loaded == ["vae_decoder"]
    assert pool.loads == ["unet", "vae_decoder"]


def test_the_loads_that_a_pool_remembers_are_bounded(make_pool, machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdxl_trt.engines.residency.pool.MOST_LOADS", 3)
    with make_pool("swap") as pool:
        for _ in range(3):
            pool.phase("unet")
            pool.phase("vae_decoder")
        assert pool.loads == ["vae_decoder", "unet", "vae_decoder"]
