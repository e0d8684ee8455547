"""The simulated engine: a plan's properties, what is refused, and the memory that engines and contexts take."""

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.engines.plans.files import start_reading
from sdxl_trt.engines.plans.lookup import find_plan
from sdxl_trt.mini.embedded import bundle_path

pytestmark = pytest.mark.usefixtures("lenient")


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


def test_a_runtime_is_used_by_one_thread_at_a_time(simulated: Any, tiny: Any, elsewhere: Any) -> None:
    def again(_: str) -> None:
        simulated.during_load = None
        with simulated.violation("not thread-safe"):
            tiny.engine()

    simulated.during_load = lambda name: elsewhere(lambda: again(name))
    assert tiny.engine() is not None


def test_a_plan_for_any_gpu_does_not_run_on_turing(simulated: Any, tiny: Any) -> None:
    anywhere = msgspec.structs.replace(tiny.plan.environment, gpu="any", compute_capability="any")
    assert tiny.engine(environment=anywhere) is not None
    simulated.compute_capability = (7, 5)
    assert tiny.engine(environment=anywhere) is None
    assert "targets compute capability 8.0" in simulated.logged[-1][1]


def test_failures_on_demand(simulated: Any, run: Any) -> None:
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
