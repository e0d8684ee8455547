"""TensorRT engines on the simulated device: loads and captures in different threads, and captures of streamed weights.

The simulated device lets a capture fail, and the load too, if a thread loads meanwhile.
"""

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest

from sdxl_trt.engines.errors import ResourceError

PATIENCE = 20  # seconds; only a deadlock waits that long


class Loader:
    """A thread that loads an engine and stops in the middle of each call that synchronizes the device."""

    def __init__(self, simulated: Any, engine: Any) -> None:
        self._engine = engine
        self._reached, self._resume = threading.Semaphore(0), threading.Semaphore(0)
        self.seen: list[str] = []
        self.failures: list[BaseException] = []
        self._thread = threading.Thread(target=self._run)
        simulated.during_load = self._pause

    def start(self) -> None:
        self._thread.start()

    def wait(self) -> None:
        """Wait until the thread is in the middle of the next call."""
        assert self._reached.acquire(timeout=PATIENCE)

    def resume(self) -> None:
        self._resume.release()

    def join(self) -> None:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "a deadlock"
        assert self.failures == []

    def _pause(self, what: str) -> None:
        if threading.current_thread() is self._thread:
            self.seen.append(what)
            self._reached.release()
            assert self._resume.acquire(timeout=PATIENCE)

    def _run(self) -> None:
        try:
            self._engine.load()
        except BaseException as exc:  # noqa: BLE001 - shown by the test
            self.failures.append(exc)


def test_steps_run_uncaptured_while_another_engine_loads(planned, device, simulated, caplog) -> None:
    """The base computes while the refiner's plan is deserialized and while its first context is made."""
    engine, other, inputs = (
        planned.engine("unet", device),
        planned.engine("refiner_unet", device),
        planned.inputs("unet"),
    )
    engine.load()
    engine.bind(planned.constants(inputs))
    expected = planned.run(planned.reference("unet"), inputs)
    loader = Loader(simulated, other)
    loader.start()
    for _ in ("deserialize", "create context"):
        loader.wait()
        for _ in range(3):
            planned.assert_near(engine.infer(planned.step(inputs)), expected)
        loader.resume()
    loader.join()
    assert loader.seen == ["deserialize", "create context"]
    assert simulated.calls["cudaStreamBeginCapture"] == 0
    for _ in range(2):
        planned.assert_near(engine.infer(planned.step(inputs)), expected)
    assert (simulated.calls["cudaStreamBeginCapture"], simulated.calls["cudaGraphLaunch"]) == (1, 2)
    assert caplog.records == []
    other.unload()
    engine.unload()


class Watched:
    """A lock that tells whether the calling thread holds it, and calls `before` when a thread is about to wait."""

    def __init__(self, lock: Any, before: Callable[[], None]) -> None:
        self._lock, self._before = lock, before
        self._depth = threading.local()

    @property
    def held(self) -> bool:
        return getattr(self._depth, "value", 0) > 0

    def acquire(self, blocking: bool = True) -> bool:
        if blocking and not self.held:
            self._before()
        taken = bool(self._lock.acquire(blocking=blocking))
        self._depth.value = getattr(self._depth, "value", 0) + taken
        return taken

    def release(self) -> None:
        self._depth.value -= 1
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def test_a_load_waits_for_the_end_of_a_capture(planned, device, simulated, monkeypatch, caplog) -> None:
    engine, other, inputs = (
        planned.engine("unet", device),
        planned.engine("refiner_unet", device),
        planned.inputs("unet"),
    )
    engine.load()
    engine.bind(planned.constants(inputs))
    expected = engine.infer(planned.step(inputs))
    waits = threading.Event()
    monkeypatch.setattr(device, "_loading", Watched(device._loading, waits.set))
    simulated.during_load = None
    failures: list[BaseException] = []

    def load() -> None:
        try:
            other.load()
        except BaseException as exc:  # noqa: BLE001 - shown by the test
            failures.append(exc)

    thread = threading.Thread(target=load)
    capture = device.stream.capture

    def slow(record: Callable[[], None], doing: str) -> Any:
        def recorded() -> None:
            thread.start()
            assert waits.wait(PATIENCE)
            assert len(simulated.deserialized) == 1, "loaded during a capture"
            record()

        return capture(recorded, doing)

    monkeypatch.setattr(device.stream, "capture", slow)
    planned.assert_near(engine.infer(planned.step(inputs)), expected)
    thread.join(PATIENCE)
    assert (failures, caplog.records) == ([], [])
    assert len(simulated.deserialized) == 2
    assert simulated.calls["cudaGraphLaunch"] == 1
    other.unload()
    engine.unload()


def test_no_thread_waits_for_one_lock_while_it_holds_the_other(planned, device, simulated, monkeypatch) -> None:
    """So no order of calls in any threads can deadlock."""
    order: list[str] = []

    def about_to_compute() -> None:
        order.append("lock")
        assert not loading.held, "a load waits for the engine that computes"

    def about_to_load() -> None:
        order.append("loading")
        assert not lock.held, "a step waits for a load"

    lock = Watched(device.lock, about_to_compute)
    loading = Watched(device._loading, about_to_load)
    monkeypatch.setattr(device, "lock", lock)
    monkeypatch.setattr(device, "_loading", loading)
    for failing in range(1, 6):  # weights, context, activations, tensors
        engine = planned.engine("unet", device)
        simulated.memory.failing.clear()
        simulated.fail_allocation(failing)
        with pytest.raises(ResourceError):  # noqa: PT012 - whichever call comes first
            engine.load()
            for height in (8, 8, 8, 12, 12):
                planned.run(engine, planned.inputs("unet", height=height))
        engine.unload()
    simulated.memory.failing.clear()
    engine = planned.engine("unet", device)
    engine.load()
    for height in (8, 8, 8, 12, 12, 16, 20, 24):
        planned.run(engine, planned.inputs("unet", height=height))
    engine.unload()
    assert simulated.calls["cudaGraphLaunch"] > 0
    assert set(order) == {"lock", "loading"}


def test_an_engine_that_failed_to_load_is_freed_under_the_lock(planned, device, simulated, monkeypatch) -> None:
    """Freeing an engine synchronizes the device, and would break a capture in another thread."""
    held: list[bool] = []
    lock = Watched(device.lock, lambda: None)
    monkeypatch.setattr(device, "lock", lock)
    from simulated.engines import EngineState

    def close(state: Any) -> None:
        held.append(lock.held)
        closed(state)

    closed = EngineState.close
    monkeypatch.setattr(EngineState, "close", close)
    engine = planned.engine("unet", device)
    simulated.fail_allocation(2)  # the context: the traceback refers to the engine
    with pytest.raises(ResourceError):
        engine.load()
    assert held == [True]


@pytest.mark.parametrize(("share", "captures"), [(0.0, 0), (0.5, 0), (1.0, 1), (None, 1)])
def test_streamed_weights_are_never_captured(plan, device, simulated, caplog, share, captures: int) -> None:
    planned = plan(weight_streaming=True)
    streamable = planned.records["unet"].memory.streamable
    budget = None if share is None else int(share * streamable)
    engine, inputs = planned.engine("unet", device, weight_budget=budget), planned.inputs("unet")
    expected = planned.run(planned.reference("unet"), inputs)
    with caplog.at_level(logging.WARNING, "sdxl_trt"):
        for _ in range(2):  # loaded again, it decides again
            engine.load()
            for _ in range(3):
                planned.assert_near(planned.run(engine, inputs), expected)
            engine.unload()
    assert simulated.calls["cudaStreamBeginCapture"] == 2 * captures
    assert caplog.records == []
