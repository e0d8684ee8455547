"""CUDA graphs of simulated executions, and what must not happen while a stream captures."""

from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("lenient")


def _captured(run: Any) -> Any:
    cuda, ok = run.tiny.cuda, run.tiny.ok
    ok(cuda.cudaStreamBeginCapture(run.stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal))
    assert run.execute()
    graph = ok(cuda.cudaStreamEndCapture(run.stream))
    return ok(cuda.cudaGraphInstantiate(graph, 0))


def test_a_graph_uses_the_inputs_at_its_launch(simulated: Any, run: Any) -> None:
    run.send()
    assert run.execute()
    run.wait()
    graph = _captured(run)
    run.hosts["x"][1][...] = 2 * run.x
    run.send()
    run.tiny.ok(run.tiny.cuda.cudaGraphLaunch(graph, run.stream))
    view = run.receive()
    run.wait()
    np.testing.assert_allclose(view, run.expected(2 * run.x, run.t), rtol=1e-6)


def test_a_graph_is_invalid_after_its_context_changes(simulated: Any, run: Any) -> None:
    run.send()
    assert run.execute()
    run.wait()
    graph = _captured(run)
    run.context.set_input_shape("x", (1, 4, 8))  # no change
    run.tiny.ok(run.tiny.cuda.cudaGraphLaunch(graph, run.stream))
    run.wait()
    run.context.set_input_shape("x", (1, 4, 7))
    run.tiny.ok(run.tiny.cuda.cudaGraphLaunch(graph, run.stream))
    with simulated.violation("had been changed"):
        run.wait()


def test_the_first_run_for_a_shape_cannot_be_captured(run: Any) -> None:
    cuda, ok = run.tiny.cuda, run.tiny.ok
    ok(cuda.cudaStreamBeginCapture(run.stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal))
    assert run.execute() is False
    assert cuda.cudaStreamEndCapture(run.stream)[0].name == "cudaErrorStreamCaptureInvalidated"


def test_an_engine_that_streams_weights_cannot_be_captured(simulated: Any, tiny: Any) -> None:
    engine = tiny.engine(streamable=1 << 19)
    engine.weight_streaming_budget_v2 = 1 << 18
    context = tiny.context(engine, scratch=1024 + engine.weight_streaming_scratch_memory_size)
    stream = tiny.stream()
    assert context.execute_async_v3(int(stream))
    tiny.ok(tiny.cuda.cudaStreamSynchronize(stream))
    tiny.ok(tiny.cuda.cudaStreamBeginCapture(stream, tiny.cuda.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed))
    assert context.execute_async_v3(int(stream)) is False
    assert tiny.cuda.cudaStreamEndCapture(stream)[0].name == "cudaErrorStreamCaptureInvalidated"


@pytest.mark.parametrize(
    "change",
    [
        lambda run: run.context.set_optimization_profile_async(1, int(run.stream)),
        lambda run: run.context.set_input_shape("x", (1, 4, 7)),
        lambda run: run.context.set_tensor_address("x", run.places["x"]),
        lambda run: run.context.set_device_memory(run.places["scratch"], 1024),
    ],
    ids=["profile", "shape", "address", "memory"],
)
def test_a_context_is_not_changed_during_its_capture(simulated: Any, run: Any, change: Any) -> None:
    run.tiny.ok(_begin(run))
    with simulated.violation("was called during a capture"):
        change(run)


def _begin(run: Any) -> Any:
    cuda = run.tiny.cuda
    return cuda.cudaStreamBeginCapture(run.stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)


@pytest.mark.parametrize(
    "load",
    [
        lambda run: run.tiny.engine(),
        lambda run: run.context.engine.create_execution_context(),
        lambda run: run.tiny.cuda.cudaFree(run.places["x"])[0].name == "cudaSuccess" or None,
        lambda run: run.tiny.cuda.cudaDeviceSynchronize()[0].name == "cudaSuccess" or None,
    ],
    ids=["deserialize", "create context", "free", "synchronize"],
)
def test_no_thread_synchronizes_the_device_during_a_capture(
    simulated: Any, run: Any, load: Any, elsewhere: Any
) -> None:
    run.tiny.ok(_begin(run))
    assert elsewhere(lambda: load(run)) is None
    assert run.tiny.cuda.cudaStreamEndCapture(run.stream)[0].name == "cudaErrorStreamCaptureInvalidated"


def test_an_engine_freed_by_another_thread_spoils_a_capture(simulated: Any, run: Any, elsewhere: Any) -> None:
    engines = [run.tiny.engine()]
    run.tiny.ok(_begin(run))
    elsewhere(engines.clear)
    assert run.tiny.cuda.cudaStreamEndCapture(run.stream)[0].name == "cudaErrorStreamCaptureInvalidated"


@pytest.mark.parametrize("what", ["deserialize", "create context"])
def test_a_capture_that_begins_during_a_load_fails_and_lets_it_fail(
    simulated: Any, run: Any, what: str, elsewhere: Any
) -> None:
    engine = run.context.engine
    ended: list[str] = []

    def during(name: str) -> None:
        run.tiny.ok(_begin(run))
        ended.append(run.tiny.cuda.cudaStreamEndCapture(run.stream)[0].name)

    simulated.during_load = lambda name: elsewhere(lambda: during(name))
    assert (run.tiny.engine() if what == "deserialize" else engine.create_execution_context()) is None
    assert ended == ["cudaErrorStreamCaptureInvalidated"]
