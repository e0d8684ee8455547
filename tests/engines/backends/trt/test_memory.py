"""TensorRT engines on the simulated device: the memory they hold, free, and share between threads."""

import threading
from typing import Any

import pytest

from sdxl_trt.engines.errors import IncompatibleError, ResourceError


def test_the_activations_are_one_block_of_the_largest_need(planned, device, simulated) -> None:
    names = ("unet", "refiner_unet", "text_encoder_2")
    needs = {name: min(planned.records[name].memory.profile_activations) for name in names}  # before they run
    assert len(set(needs.values())) == 3
    engines = {name: planned.engine(name, device) for name in names}
    held: list[str] = []
    for name in sorted(names, key=lambda name: needs[name]):
        engines[name].load()
        held.append(name)
        assert device.activations.nbytes == max(needs[each] for each in held)
    weights = sum(planned.records[name].memory.weights for name in names)
    assert simulated.current_bytes == weights + max(needs.values())
    while held:
        engines[held.pop()].unload()
        assert device.activations.nbytes == max((needs[each] for each in held), default=0)
    planned.assert_empty()


def test_a_graph_is_dropped_if_the_activations_move(planned, device) -> None:
    """A larger engine is loaded and unloaded between steps of a smaller one, whose graph uses the old block."""
    needs = {name: record.memory.activations for name, record in planned.records.items()}
    small, large = sorted(("unet", "refiner_unet"), key=lambda name: needs[name])
    engine, other, reference = planned.engine(small, device), planned.engine(large, device), planned.reference(small)
    engine.load()
    for turn in range(4):
        if turn % 2:
            other.load()
        for seed in range(3):
            inputs = planned.inputs(small, seed)
            planned.assert_near(planned.run(engine, inputs), planned.run(reference, inputs))
        other.unload()
    engine.unload()


def test_memory_grows_with_the_shapes_in_use(planned, device, simulated) -> None:
    engine = planned.engine("unet", device)
    engine.load()
    loaded = simulated.current_bytes
    planned.run(engine, planned.inputs("unet"))
    small = simulated.current_bytes
    planned.run(engine, planned.inputs("unet", height=24, width=24, tokens=154))
    large = simulated.current_bytes
    assert loaded < small < large
    planned.run(engine, planned.inputs("unet"))
    assert simulated.current_bytes == large
    engine.unload()


def test_the_block_grows_with_the_profiles_in_use(planned, device, simulated) -> None:
    """A larger profile costs nothing until it is used; then the block keeps its size until the engine is unloaded."""
    engine, reference = planned.engine("vae_decoder", device), planned.reference("vae_decoder")
    whole, tile = planned.inputs("vae_decoder", height=16, width=16), planned.inputs("vae_decoder")
    engine.load()
    sizes = [device.activations.nbytes]
    for inputs in (tile, whole, tile):
        for _ in range(3):
            planned.assert_near(engine.infer(inputs), reference.infer(inputs))
        sizes.append(device.activations.nbytes)
    largest = planned.records["vae_decoder"].memory.activations
    assert sizes == [sizes[0], sizes[0], largest, largest]
    assert sizes[0] < largest / 2
    engine.unload()
    assert device.activations.nbytes == 0
    engine.load()
    assert device.activations.nbytes == sizes[0]
    engine.unload()


def test_a_profile_that_does_not_fit_leaves_the_engine_usable(planned, device, simulated) -> None:
    engine, reference = planned.engine("vae_decoder", device), planned.reference("vae_decoder")
    whole, tile = planned.inputs("vae_decoder", height=16, width=16), planned.inputs("vae_decoder")
    engine.load()
    before = device.activations.nbytes
    for _ in range(3):
        engine.infer(tile)
    simulated.fail_allocation()
    with pytest.raises(ResourceError, match="allocating memory for activations: out of memory; try --residency"):
        engine.infer(whole)
    assert device.activations.nbytes == before
    for inputs in (tile, tile, whole, tile):
        planned.assert_near(engine.infer(inputs), reference.infer(inputs))
    engine.unload()


def test_nothing_is_left_after_many_loads(planned, device, simulated) -> None:
    engines = [planned.engine(name, device) for name in ("unet", "vae_decoder")]
    peaks = set()
    for seed in range(10):
        simulated.reset_peak()
        for engine in engines:
            engine.load()
            inputs = planned.inputs(engine.name, seed)
            for _ in range(3):
                planned.run(engine, inputs)
            engine.unload()
            engine.unload()
        peaks.add(simulated.peak_bytes)
        planned.assert_empty()
    assert len(peaks) == 1
    assert simulated.deserialized == [engine._record.file.sha256 for engine in engines] * 10


def test_weights_may_stay_in_host_memory(plan, device, simulated) -> None:
    planned = plan(weight_streaming=True)
    memory = planned.records["unet"].memory
    reference = planned.reference("unet")
    inputs = planned.inputs("unet")
    for budget in (0, memory.streamable // 2, memory.streamable, 10 * memory.streamable, None):
        engine = planned.engine("unet", device, weight_budget=budget)
        engine.load()
        kept = memory.streamable if budget is None else min(budget, memory.streamable)
        assert simulated.current_bytes == memory.weights - memory.streamable + kept + device.activations.nbytes
        simulated.since()
        planned.assert_near(planned.run(engine, inputs), planned.run(reference, inputs))
        assert simulated.since().get("streamed", 0) == memory.streamable - kept
        engine.unload()
        planned.assert_empty()


def test_a_weight_budget_needs_a_plan_that_streams(planned, device) -> None:
    with pytest.raises(IncompatibleError, match=r"unet: its plan cannot stream weights.*--weight-streaming"):
        planned.engine("unet", device, weight_budget=1000)


def test_the_plan_is_read_by_prefetch_and_dropped_by_load(planned, device, simulated) -> None:
    engine = planned.engine("vae_decoder", device)
    engine.prefetch()
    first = engine._plan
    engine.prefetch()
    assert engine._plan is first
    planned.assert_empty()
    engine.load()
    assert engine._plan is None
    engine.load()
    engine.prefetch()
    assert engine._plan is None
    assert len(simulated.deserialized) == 1
    engine.unload()
    engine.prefetch()
    engine.unload()
    assert engine._plan is None


def test_one_engine_loads_while_another_runs(planned, device, simulated) -> None:
    """Like the refiner during the base phase; the block of activations grows and shrinks meanwhile."""
    engine, reference = planned.engine("unet", device), planned.reference("unet")
    engine.load()
    inputs = planned.inputs("unet")
    expected = planned.run(reference, inputs)
    engine.bind(planned.constants(inputs))
    failures: list[BaseException] = []
    ended = threading.Event()

    def work() -> None:
        try:
            for name in ["refiner_unet", "text_encoder_2", "vae_decoder"] * 4:
                other = planned.engine(name, device)
                other.load()
                other.unload()
        except BaseException as exc:  # noqa: BLE001 - shown by the test
            failures.append(exc)
        finally:
            ended.set()

    thread = threading.Thread(target=work)
    thread.start()
    steps = 0
    while not ended.is_set() or steps < 4:
        planned.assert_near(engine.infer(planned.step(inputs)), expected)
        steps += 1
    thread.join()
    assert failures == []
    engine.unload()
    planned.assert_empty()


def _is_free(lock: Any) -> bool:
    """Return whether another thread could take `lock` now."""
    answers: list[bool] = []

    def ask() -> None:
        answers.append(lock.acquire(blocking=False))
        if answers[0]:
            lock.release()

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return answers[0]


def test_the_lock_is_held_during_all_work_on_the_stream(planned, device, monkeypatch) -> None:
    engine, inputs = planned.engine("unet", device), planned.inputs("unet")
    asked: list[str] = []

    def watch(owner: Any, name: str) -> None:
        call = getattr(owner, name)

        def watched(*arguments: Any) -> Any:
            asked.append(name)
            assert not _is_free(device.lock), name
            return call(*arguments)

        monkeypatch.setattr(owner, name, watched)

    for name in ("upload", "download", "synchronize", "launch", "capture"):
        watch(device.stream, name)
    for name in ("reserve", "release", "block"):
        watch(device.activations, name)
    engine.load()
    engine.bind(planned.constants(inputs))
    for _ in range(2):
        engine.infer(planned.step(inputs))
    engine.unload()
    assert len(set(asked)) == 8
    assert _is_free(device.lock)


def test_an_engine_loaded_by_a_thread_runs_in_another(planned, device) -> None:
    engine, reference, inputs = planned.engine("unet", device), planned.reference("unet"), planned.inputs("unet")
    thread = threading.Thread(target=engine.load)
    thread.start()
    thread.join()
    planned.assert_near(planned.run(engine, inputs), planned.run(reference, inputs))
    engine.unload()
