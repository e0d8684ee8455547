"""The simulated execution: the graph's results, in stream order, with valid and large enough memory."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("lenient")
MakeRun = Callable[..., Any]


@pytest.mark.parametrize("rows", [1, 2])
def test_an_execution_computes_the_graph(simulated: Any, make_run: MakeRun, rows: int) -> None:
    run = make_run(rows)
    run.send()
    assert run.execute()
    view = run.receive()
    assert simulated.executed == []
    run.wait()
    assert simulated.executed == ["tiny"]
    np.testing.assert_allclose(view, run.expected(run.x, run.t), rtol=1e-6)
    sent = run.x.nbytes + run.t.nbytes
    assert simulated.since() == {"weights": 1 << 20, "HostToDevice": sent, "DeviceToHost": view.nbytes}


def test_shapes_outside_the_active_profile_are_refused(simulated: Any, tiny: Any) -> None:
    context = tiny.engine().create_execution_context()
    assert tuple(context.get_tensor_shape("x")) == (-1, 4, -1)
    assert context.infer_shapes() == ["x", "t"]
    for shape in ((2, 4, 8), (1, 4, 17), (1, 5, 8), (1, 4)):
        assert context.set_input_shape("x", shape) is False
    assert simulated.logged[-1][1].startswith("IExecutionContext::setInputShape: Error Code 3")
    assert context.set_optimization_profile_async(1, 0)
    assert context.set_input_shape("x", [2, 4, 8])
    assert context.set_input_shape("t", tiny.trt.Dims((2,)))
    assert tuple(context.get_tensor_shape("y")) == (2, 4, 16)
    assert context.active_optimization_profile == 1
    with pytest.raises(RuntimeError, match="set optimization profile"):
        context.set_optimization_profile_async(2, 0)


def test_a_context_that_is_not_ready_does_not_run(simulated: Any, tiny: Any) -> None:
    context = tiny.engine().create_execution_context()
    stream = int(tiny.stream())
    reasons = []
    for step in (
        lambda: None,
        lambda: context.set_input_shape("x", (1, 4, 8)) and context.set_input_shape("t", (1,)),
    ):
        step()
        assert context.execute_async_v3(stream) is False
        reasons.append(simulated.logged[-1][1])
    assert "has no shape" in reasons[0]
    assert "has no address" in reasons[1]


def test_activation_memory_must_be_large_enough(simulated: Any, make_run: MakeRun) -> None:
    run = make_run(1, scratch=1023)
    assert run.execute() is False
    assert "1024 are needed" in simulated.logged[-1][1]
    assert run.context.update_device_memory_size_for_shapes() == 768
    assert run.execute() is True


@pytest.mark.parametrize(("name", "size"), [("x", 127), ("y", 255), ("t", 3)])
def test_buffers_must_hold_their_tensors(simulated: Any, make_run: MakeRun, name: str, size: int) -> None:
    run = make_run(1, **{name: size})
    with simulated.violation(f"tiny: {name}: .* overrun"):
        run.execute()


def test_addresses_must_be_device_memory_and_aligned(simulated: Any, run: Any) -> None:
    with simulated.violation("not aligned"):
        run.context.set_tensor_address("x", run.places["x"] + 4)
    with simulated.violation("is not device memory"):
        run.context.set_tensor_address("x", run.hosts["x"][0])
    with simulated.violation("not aligned"):
        run.context.set_device_memory(run.places["scratch"] + 128, 512)
    with simulated.violation("overrun"):
        run.context.set_device_memory(run.places["scratch"], 2048)
    with simulated.violation("no tensor 'z'"):
        run.context.set_tensor_address("z", run.places["x"])
    run.context.set_tensor_address("y", run.places["x"])
    with simulated.violation("overrun"):
        run.execute()


def test_an_output_must_not_overlap_anything_else(simulated: Any, make_run: MakeRun) -> None:
    run = make_run(1, x=512)
    run.context.set_tensor_address("y", run.places["x"])
    with simulated.violation("overlaps"):
        run.execute()


def test_memory_freed_before_an_execution_is_detected(simulated: Any, run: Any) -> None:
    run.send()
    run.wait()
    run.tiny.ok(run.tiny.cuda.cudaFree(run.places["scratch"]))
    with simulated.violation("activations: .* was freed"):
        run.execute()


def test_contexts_that_share_activations_must_be_ordered(simulated: Any, make_run: MakeRun) -> None:
    first = make_run()
    second = make_run()
    second.context.set_device_memory(first.places["scratch"], 1024)
    for each in (first, second):
        each.send()
    assert first.execute()
    with simulated.violation("races with work"):
        second.execute()


def test_a_context_runs_on_one_stream_at_a_time(simulated: Any, run: Any) -> None:
    run.send()
    assert run.execute()
    with simulated.violation("races with work"):
        run.context.execute_async_v3(int(run.tiny.stream()))


def test_a_profile_switch_is_work_on_its_stream(simulated: Any, run: Any) -> None:
    run.context.set_optimization_profile_async(0, int(run.tiny.stream()))
    run.context.set_input_shape("x", (1, 4, 8))
    run.context.set_input_shape("t", (1,))
    with simulated.violation("tiny on stream .* races with work .* .the context of tiny."):
        run.execute()


def test_queued_work_must_not_outlive_its_context(simulated: Any, run: Any) -> None:
    run.send()
    assert run.execute()
    del run.context
    with simulated.violation("after its context was destroyed"):
        run.wait()
