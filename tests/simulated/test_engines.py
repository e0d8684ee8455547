"""The simulated engine: the graph's results, in stream order, with valid and large enough memory."""

import hashlib
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.engines.plans.files import start_reading
from sdxl_trt.engines.plans.lookup import find_plan
from sdxl_trt.mini.embedded import bundle_path

X = np.random.default_rng(3).standard_normal((2, 4, 8)).astype(np.float32)
T = np.array([0.5, 2], np.float32)


@pytest.fixture(autouse=True)
def _lenient(simulated: Any) -> None:
    """These tests leave broken state on purpose; leaks have their own test."""
    simulated.leaks_matter = False


def _expected(rows: int) -> Any:
    once = X[:rows] * np.arange(4, dtype=np.float32).reshape(4, 1) + T[:rows, None, None]
    return np.concatenate([once, once], axis=2)


class Run:
    """The tiny plan on a stream, with pinned buffers for inputs and outputs."""

    def __init__(self, tiny: Any, rows: int = 1, **sizes: int) -> None:
        self.tiny, self.stream, self.rows = tiny, tiny.stream(), rows
        self.engine = tiny.engine()
        self.context = tiny.context(self.engine, rows, **sizes)
        self.places = tiny.places
        self.hosts = {name: tiny.pinned(array) for name, array in (("x", X[:rows]), ("t", T[:rows]))}
        self.hosts["y"] = tiny.pinned(np.zeros((rows, 4, 16), np.float32))

    def send(self) -> None:
        kind = self.tiny.kinds.cudaMemcpyHostToDevice
        for name in ("x", "t"):
            pointer, view = self.hosts[name]
            self.tiny.ok(self.tiny.cuda.cudaMemcpyAsync(self.places[name], pointer, view.nbytes, kind, self.stream))

    def receive(self) -> Any:
        pointer, view = self.hosts["y"]
        kind = self.tiny.kinds.cudaMemcpyDeviceToHost
        self.tiny.ok(self.tiny.cuda.cudaMemcpyAsync(pointer, self.places["y"], view.nbytes, kind, self.stream))
        return view

    def execute(self) -> bool:
        return bool(self.context.execute_async_v3(int(self.stream)))

    def wait(self) -> None:
        self.tiny.ok(self.tiny.cuda.cudaStreamSynchronize(self.stream))


@pytest.fixture
def run(tiny: Any) -> Run:
    return Run(tiny)


@pytest.mark.parametrize("rows", [1, 2])
def test_an_execution_computes_the_graph(simulated: Any, tiny: Any, rows: int) -> None:
    run = Run(tiny, rows)
    run.send()
    assert run.execute()
    view = run.receive()
    assert simulated.executed == []
    run.wait()
    assert simulated.executed == ["tiny"]
    np.testing.assert_allclose(view, _expected(rows), rtol=1e-6)
    sent = X[:rows].nbytes + T[:rows].nbytes
    assert simulated.since() == {"weights": 1 << 20, "HostToDevice": sent, "DeviceToHost": view.nbytes}


def test_an_engine_has_the_properties_of_its_plan(tiny: Any) -> None:
    engine, trt = tiny.engine(), tiny.trt
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    assert names == ["x", "t", "y"]
    assert [engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names] == [True, True, False]
    assert tuple(engine.get_tensor_shape("y")) == (-1, 4, -1)
    assert engine.get_tensor_dtype("x") == trt.float32
    assert [tuple(dims) for dims in engine.get_tensor_profile_shape("x", 1)] == [(2, 4, 1), (2, 4, 8), (2, 4, 16)]
    assert (engine.num_optimization_profiles, engine.device_memory_size_v2) == (2, 4096)
    assert engine.get_device_memory_size_for_profile_v2(0) == 1024
    assert (engine.streamable_weights_size, engine.get_engine_stat()) == (0, 1 << 20)


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


def test_activation_memory_must_be_large_enough(simulated: Any, tiny: Any) -> None:
    run = Run(tiny, 1, scratch=1023)
    assert run.execute() is False
    assert "1024 are needed" in simulated.logged[-1][1]
    assert run.context.update_device_memory_size_for_shapes() == 768
    assert run.execute() is True


@pytest.mark.parametrize(("name", "size"), [("x", 127), ("y", 255), ("t", 3)])
def test_buffers_must_hold_their_tensors(simulated: Any, tiny: Any, name: str, size: int) -> None:
    run = Run(tiny, 1, **{name: size})
    with simulated.violation(f"tiny: {name}: .* overrun"):
        run.execute()


def test_addresses_must_be_device_memory_and_aligned(simulated: Any, run: Run) -> None:
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


def test_an_output_must_not_overlap_anything_else(simulated: Any, tiny: Any) -> None:
    run = Run(tiny, 1, x=512)
    run.context.set_tensor_address("y", run.places["x"])
    with simulated.violation("overlaps"):
        run.execute()


def test_memory_freed_before_an_execution_is_detected(simulated: Any, run: Run) -> None:
    run.send()
    run.wait()
    run.tiny.ok(run.tiny.cuda.cudaFree(run.places["scratch"]))
    with simulated.violation("activations: .* was freed"):
        run.execute()


def test_contexts_that_share_activations_must_be_ordered(simulated: Any, tiny: Any) -> None:
    first = Run(tiny)
    second = Run(tiny)
    second.context.set_device_memory(first.places["scratch"], 1024)
    for each in (first, second):
        each.send()
    assert first.execute()
    with simulated.violation("races with work"):
        second.execute()


def test_a_context_runs_on_one_stream_at_a_time(simulated: Any, run: Run) -> None:
    run.send()
    assert run.execute()
    with simulated.violation("races with work"):
        run.context.execute_async_v3(int(run.tiny.stream()))


def test_a_profile_switch_is_work_on_its_stream(simulated: Any, run: Run) -> None:
    run.context.set_optimization_profile_async(0, int(run.tiny.stream()))
    run.context.set_input_shape("x", (1, 4, 8))
    run.context.set_input_shape("t", (1,))
    with simulated.violation("tiny on stream .* races with work .* .the context of tiny."):
        run.execute()


def test_queued_work_must_not_outlive_its_context(simulated: Any, run: Run) -> None:
    run.send()
    assert run.execute()
    del run.context
    with simulated.violation("after its context was destroyed"):
        run.wait()


def _captured(run: Run) -> Any:
    cuda, ok = run.tiny.cuda, run.tiny.ok
    ok(cuda.cudaStreamBeginCapture(run.stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal))
    assert run.execute()
    graph = ok(cuda.cudaStreamEndCapture(run.stream))
    return ok(cuda.cudaGraphInstantiate(graph, 0))


def test_a_graph_uses_the_inputs_at_its_launch(simulated: Any, run: Run) -> None:
    run.send()
    assert run.execute()
    run.wait()
    graph = _captured(run)
    run.hosts["x"][1][...] = 2 * X[:1]
    run.send()
    run.tiny.ok(run.tiny.cuda.cudaGraphLaunch(graph, run.stream))
    view = run.receive()
    run.wait()
    np.testing.assert_allclose(view[..., :8], 2 * X[:1] * np.arange(4).reshape(4, 1) + 0.5, rtol=1e-6)


def test_a_graph_is_invalid_after_its_context_changes(simulated: Any, run: Run) -> None:
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


def test_the_first_run_for_a_shape_cannot_be_captured(run: Run) -> None:
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
def test_a_context_is_not_changed_during_its_capture(simulated: Any, run: Run, change: Any) -> None:
    cuda = run.tiny.cuda
    run.tiny.ok(cuda.cudaStreamBeginCapture(run.stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal))
    with simulated.violation("was called during a capture"):
        change(run)


def _elsewhere(call: Any) -> Any:
    """Return the result of `call` in another thread."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join()
    return results[0]


def _begin(run: Run) -> Any:
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
def test_no_thread_synchronizes_the_device_during_a_capture(simulated: Any, run: Run, load: Any) -> None:
    run.tiny.ok(_begin(run))
    assert _elsewhere(lambda: load(run)) is None
    assert run.tiny.cuda.cudaStreamEndCapture(run.stream)[0].name == "cudaErrorStreamCaptureInvalidated"


def test_an_engine_freed_by_another_thread_spoils_a_capture(simulated: Any, run: Run) -> None:
    engines = [run.tiny.engine()]
    run.tiny.ok(_begin(run))
    _elsewhere(engines.clear)
    assert run.tiny.cuda.cudaStreamEndCapture(run.stream)[0].name == "cudaErrorStreamCaptureInvalidated"


@pytest.mark.parametrize("what", ["deserialize", "create context"])
def test_a_capture_that_begins_during_a_load_fails_and_lets_it_fail(simulated: Any, run: Run, what: str) -> None:
    engine = run.context.engine
    ended: list[str] = []

    def during(name: str) -> None:
        run.tiny.ok(_begin(run))
        ended.append(run.tiny.cuda.cudaStreamEndCapture(run.stream)[0].name)

    simulated.during_load = lambda name: _elsewhere(lambda: during(name))
    assert (run.tiny.engine() if what == "deserialize" else engine.create_execution_context()) is None
    assert ended == ["cudaErrorStreamCaptureInvalidated"]


def test_a_runtime_is_used_by_one_thread_at_a_time(simulated: Any, tiny: Any) -> None:
    def again(_: str) -> None:
        simulated.during_load = None
        with simulated.violation("not thread-safe"):
            tiny.engine()

    simulated.during_load = lambda name: _elsewhere(lambda: again(name))
    assert tiny.engine() is not None


def test_a_plan_for_any_gpu_does_not_run_on_turing(simulated: Any, tiny: Any) -> None:
    anywhere = msgspec.structs.replace(tiny.plan.environment, gpu="any", compute_capability="any")
    assert tiny.engine(environment=anywhere) is not None
    simulated.compute_capability = (7, 5)
    assert tiny.engine(environment=anywhere) is None
    assert "targets compute capability 8.0" in simulated.logged[-1][1]


def test_failures_on_demand(simulated: Any, run: Run) -> None:
    simulated.fail_next_execute()
    assert [run.execute(), run.execute()] == [False, True]
    simulated.fail_next_deserialize()
    assert run.tiny.engine() is None
    assert run.tiny.engine() is not None
    simulated.sticky_after(0)
    run.tiny.cuda.cudaMemGetInfo()
    assert run.execute() is False
    assert run.tiny.engine() is None
    assert "illegal memory access" in simulated.logged[-1][1]


def test_foreign_and_damaged_plans_are_rejected(simulated: Any, tiny: Any) -> None:
    older = msgspec.structs.replace(tiny.plan.environment, tensorrt="11.3.0.1")
    other = msgspec.structs.replace(tiny.plan.environment, compute_capability="8.6")
    assert tiny.engine(environment=older) is None
    assert tiny.engine(environment=other) is None
    assert "incompatible device, expecting compute 8.9 got compute 8.6" in simulated.logged[-1][1]
    content = tiny.encode(tiny.plan)
    for broken in (content[:-1], b"\0" + content[1:], content[:16] + b"x" * (len(content) - 16)):
        assert tiny.runtime.deserialize_cuda_engine(broken) is None
    assert tiny.runtime.deserialize_cuda_engine(memoryview(content)) is not None
    assert simulated.deserialized == [hashlib.sha256(content).hexdigest()]
    with simulated.violation("refers to a graph that no simulated bundle has"):
        tiny.engine(graph="0" * 64)


def test_a_plan_can_be_read_in_pieces(simulated: Any, tiny: Any) -> None:
    content, trt = tiny.encode(tiny.plan), tiny.trt

    class Reader(trt.IStreamReaderV2):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamReaderV2.__init__(self)
            self.at = 0

        def read(self, num_bytes: int, stream: int) -> bytes:
            piece = content[self.at : self.at + min(num_bytes, 1000)]
            self.at += len(piece)
            return piece

        def seek(self, offset: int, where: Any) -> bool:
            assert where == trt.SeekPosition.SET
            self.at = offset
            return True

    assert tiny.runtime.deserialize_cuda_engine(Reader()).num_io_tensors == 3
    assert simulated.deserialized == [hashlib.sha256(content).hexdigest()]


def test_weights_and_activations_are_counted_until_their_owners_are_deleted(simulated: Any, tiny: Any) -> None:
    weights = 1 << 20
    engine = tiny.engine()
    assert simulated.current_bytes == weights
    static = engine.create_execution_context()
    assert simulated.current_bytes == weights + 4096
    strategies = tiny.trt.ExecutionContextAllocationStrategy
    changing = engine.create_execution_context(strategies.ON_PROFILE_CHANGE)
    assert simulated.current_bytes == weights + 4096 + 1024
    changing.set_optimization_profile_async(1, 0)
    assert simulated.current_bytes == weights + 4096 + 4096
    managed = engine.create_execution_context(strategies.USER_MANAGED)
    del static, changing
    assert simulated.current_bytes == weights
    del engine
    assert simulated.current_bytes == weights
    del managed
    assert simulated.current_bytes == 0
    assert simulated.peak_bytes == weights + 8192
    simulated.reset_peak()
    assert simulated.peak_bytes == 0


def test_engines_and_contexts_that_do_not_fit_are_none(simulated: Any, tiny: Any) -> None:
    simulated.memory_limit = (1 << 20) + 4095
    engine = tiny.engine()
    assert engine.create_execution_context() is None
    assert "OutOfMemory" in simulated.logged[-1][1]
    assert tiny.engine() is None
    simulated.fail_allocation()
    assert engine.create_execution_context(tiny.trt.ExecutionContextAllocationStrategy.USER_MANAGED) is None


def test_leaked_objects_are_found(simulated: Any, tiny: Any) -> None:
    engine = tiny.engine()
    with pytest.raises(AssertionError, match="1 Runtime; 1 ICudaEngine"):
        simulated.check_no_leaks()
    del engine, tiny.runtime
    simulated.check_no_leaks()


def test_weight_streaming_keeps_the_budget_on_the_device(simulated: Any, tiny: Any) -> None:
    weights, streamable = 1 << 20, 1 << 19
    engine = tiny.engine(streamable=streamable)
    assert (simulated.current_bytes, engine.weight_streaming_budget_v2) == (0, streamable)
    before = engine.device_memory_size_v2
    engine.weight_streaming_budget_v2 = 1 << 18
    scratch = engine.weight_streaming_scratch_memory_size
    assert engine.device_memory_size_v2 == before + scratch > before
    context = tiny.context(engine, scratch=1024 + scratch)
    assert simulated.current_bytes == weights - streamable + (1 << 18) + sum(tiny.buffers.values())
    with simulated.violation("while contexts exist"):
        engine.weight_streaming_budget_v2 = 0
    stream = tiny.stream()
    for name in ("x", "t"):
        tiny.ok(tiny.cuda.cudaMemsetAsync(tiny.places[name], 0, tiny.buffers[name], stream))
    assert context.execute_async_v3(int(stream))
    tiny.ok(tiny.cuda.cudaStreamSynchronize(stream))
    assert simulated.since()["streamed"] == streamable - (1 << 18)
    del context
    engine.weight_streaming_budget_v2 = 0
    with simulated.violation("can stream 0 bytes"):
        tiny.engine().weight_streaming_budget_v2 = 1


def test_host_code_in_plans_is_refused(simulated: Any, tiny: Any) -> None:
    assert tiny.runtime.engine_host_code_allowed is False
    with simulated.violation("engine_host_code_allowed"):
        tiny.runtime.engine_host_code_allowed = True


def test_a_bundle_gets_plans_for_the_simulated_device(simulated: Any, tmp_path: Path) -> None:
    root = simulated.bundle(
        bundle_path(), tmp_path / "bundle", height=64, width=(64, 128, 128), tokens=77, static=False
    )
    bundle = read_bundle(root)
    assert {record.key.component for record in bundle.manifest.plans} == set(bundle.manifest.components)
    record = find_plan(bundle, "unet", simulated.environment())
    *_, profile = record.key.profiles
    factor = bundle.manifest.base.vae.factor
    assert profile.shapes["sample"][2][2:] == (64 // factor, 128 // factor)
    import tensorrt as trt

    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(start_reading(bundle, record).whole())
    assert engine.device_memory_size_v2 == record.memory.activations
    assert simulated.current_bytes == record.memory.weights == bundle.manifest.components["unet"].weights.size
    assert not read_bundle(bundle_path()).manifest.plans
    again = simulated.bundle(root, tmp_path / "again")
    kept = [
        [(each.key, each.memory) for each in plans]
        for plans in (read_bundle(again).manifest.plans, bundle.manifest.plans)
    ]
    assert kept[0] == kept[1]
    streaming = simulated.bundle(root, tmp_path / "s", weight_streaming=True, activations=lambda name, profile: 1000)
    (unet,) = [each for each in read_bundle(streaming).manifest.plans if each.key.component == "unet"]
    assert (unet.memory.activations, unet.key.flags.weight_streaming) == (1024, True)
    assert 0 < unet.memory.streamable < unet.memory.weights
