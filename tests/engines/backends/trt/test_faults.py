"""TensorRT engines on the simulated device: every failure raises the right error and leaks nothing."""

from typing import Any

import msgspec
import numpy as np
import pytest

from sdxl_trt.engines.backends.trt.engine import TrtDevice, TrtEngine, open_device
from sdxl_trt.engines.bundle.plan_record import PlanRecord
from sdxl_trt.engines.errors import CorruptError, EngineError, IncompatibleError, ResourceError, SizeError, UsageError


def test_shapes_outside_the_profiles_are_a_size_error(planned, device) -> None:
    engine, reference = planned.engine("unet", device), planned.reference("unet")
    engine.load()
    with pytest.raises(
        SizeError, match=r"unet: the plan takes rows 1 to 4, height 8 to 24 \(16 to 48 pixels\).*height 28"
    ):
        planned.run(engine, planned.inputs("unet", height=28))
    inputs = planned.inputs("unet")
    planned.assert_near(planned.run(engine, inputs), planned.run(reference, inputs))
    engine.unload()


def test_wrong_inputs_are_usage_errors(planned, device) -> None:
    engine, inputs = planned.engine("unet", device), planned.inputs("unet")
    for call in (lambda: engine.infer(inputs), lambda: engine.bind(inputs)):
        with pytest.raises(EngineError, match=r"unet: (infer|bind) before load; call load\(\) first"):
            call()
    engine.load()
    with pytest.raises(UsageError, match="input no_such bound, but the graph takes"):
        engine.bind({"no_such": inputs["sample"]})
    with pytest.raises(UsageError, match="input text_embeds: float64"):
        engine.bind({"text_embeds": inputs["text_embeds"].astype(np.float64)})
    with pytest.raises(UsageError, match="input text_embeds: float32"):
        engine.bind({"text_embeds": inputs["text_embeds"][0]})
    engine.bind({})
    engine.bind(planned.constants(inputs))
    with pytest.raises(UsageError, match="output no_such requested, but the graph has"):
        engine.infer(planned.step(inputs), ["no_such"])
    with pytest.raises(UsageError, match="but the graph takes"):
        engine.infer({"sample": inputs["sample"]})
    with pytest.raises(UsageError, match="but the graph takes"):
        engine.infer({})
    more = planned.inputs("unet", rows=3)
    with pytest.raises(UsageError, match=r"shape \[2, .* given, \['rows'"):
        engine.infer(planned.step(more))
    engine.unload()
    engine.load()
    with pytest.raises(UsageError, match="but the graph takes"):
        engine.infer(planned.step(inputs))  # unload freed the constants
    engine.unload()


def _scenario(planned: Any, device: TrtDevice, engine: TrtEngine) -> None:
    """Run without a graph, capture, launch; then with larger buffers, and capture again."""
    engine.load()
    for height in (8, 8, 8, 12, 12):
        planned.run(engine, planned.inputs("unet", height=height))


def test_memory_may_run_out_at_every_allocation(planned, device, simulated) -> None:
    messages: list[str] = []
    for attempts in range(1, 40):
        engine = planned.engine("unet", device)
        simulated.memory.failing.clear()
        simulated.fail_allocation(attempts)
        try:
            _scenario(planned, device, engine)
        except ResourceError as exc:
            messages.append(str(exc))
        else:
            engine.unload()
            break
        engine.unload()
        planned.assert_empty()
    assert len(messages) > 8  # weights, context, activations, inputs, outputs, larger ones
    assert all("out of memory; try --residency" in message for message in messages)
    assert {message.partition(":")[0] for message in messages} >= {
        "loading unet", "allocating memory for activations", "allocating memory for out_sample of unet",
    }  # fmt: skip
    simulated.memory.failing.clear()
    engine = planned.engine("unet", device)
    _scenario(planned, device, engine)
    engine.unload()


def test_an_engine_that_does_not_fit_does_not_affect_the_others(planned, device, simulated) -> None:
    needs = {name: min(planned.records[name].memory.profile_activations) for name in ("unet", "refiner_unet")}
    small, large = sorted(needs, key=lambda name: needs[name])
    engine, other, reference = planned.engine(small, device), planned.engine(large, device), planned.reference(small)
    engine.load()
    inputs = planned.inputs(small, rows=1, height=16, width=16)
    expected = planned.run(reference, inputs)
    for _ in range(3):
        planned.assert_near(planned.run(engine, inputs), expected)
    assert device.activations.nbytes < needs[large]
    before = simulated.current_bytes
    simulated.memory_limit = before + planned.records[large].memory.weights + 100  # weights fit, activations do not
    with pytest.raises(ResourceError, match="allocating memory for activations: out of memory"):
        other.load()
    assert simulated.current_bytes == before
    planned.assert_near(planned.run(engine, inputs), expected)
    engine.unload()


def test_a_bind_that_fails_leaves_nothing_bound(planned, device, simulated) -> None:
    engine, reference, inputs = planned.engine("unet", device), planned.reference("unet"), planned.inputs("unet")
    engine.load()
    engine.bind(planned.constants(inputs))
    simulated.fail_allocation()
    with pytest.raises(ResourceError, match="encoder_hidden_states of unet: out of memory"):
        engine.bind(planned.constants(planned.inputs("unet", tokens=154)))
    with pytest.raises(UsageError, match="but the graph takes"):
        engine.infer(planned.step(inputs))
    planned.assert_near(planned.run(engine, inputs), planned.run(reference, inputs))
    engine.unload()


def test_a_kept_error_keeps_no_engine_alive(planned, device, simulated) -> None:
    """Its traceback would keep gigabytes on the device while the next policy is tried."""
    engine = planned.engine("unet", device)
    kept: list[Exception] = []
    for failing in range(1, 4):  # weights, context, activations
        simulated.fail_allocation(failing)
        try:
            engine.load()
        except ResourceError as exc:
            kept.append(exc)
        simulated.memory.failing.clear()
        planned.assert_empty()
    assert len(kept) == 3


def test_a_device_may_be_lost_at_every_call(plan, simulated) -> None:
    planned = plan()
    messages: list[str] = []
    for calls in range(200):
        lost = type(simulated)()
        lost.install()
        lost.sources.update(simulated.sources)
        lost.sticky_after(calls)
        device = engine = None
        try:
            device = open_device("tensorrt")
            engine = planned.engine("unet", device)
            _scenario(planned, device, engine)
        except EngineError as exc:
            messages.append(str(exc))
        finally:
            if engine is not None:
                engine.unload()
            if device is not None:
                device.close()
            done = not lost.sticky
            engine = device = None
            lost.remove()
        lost.check_no_leaks()
        if done:
            break
    assert done
    assert len(messages) > 40
    assert all("this process can no longer use the GPU" in message for message in messages)


def test_a_failed_deserialization_is_explained(planned, device, simulated) -> None:
    engine = planned.engine("unet", device)
    simulated.fail_next_deserialize()
    with pytest.raises(EngineError, match=r"loading unet: TensorRT failed: .*Engine deserialization failed"):
        engine.load()
    planned.assert_empty()
    engine.load()
    engine.unload()


def test_a_device_lost_before_a_load_is_reported_as_lost(planned, device, simulated) -> None:
    """TensorRT only reports that it could not load; a kernel of another engine lost the device."""
    engine = planned.engine("unet", device)
    engine.prefetch()
    device.cuda.enter("x")
    simulated.sticky = True
    with pytest.raises(
        EngineError, match=r"loading unet: cudaErrorIllegalAddress.*this process can no longer use the GPU"
    ):
        engine.load()


def _changed(planned: Any, name: str, **changes: Any) -> PlanRecord:
    record = planned.records[name]
    return msgspec.structs.replace(record, **changes)


def test_a_plan_of_another_version_is_incompatible(plan, simulated, device) -> None:
    planned = plan(environment=msgspec.structs.replace(simulated.environment(), tensorrt="11.0.0.114"))
    with pytest.raises(
        IncompatibleError, match=r"loading unet: TensorRT failed: .*Serialization.*; build the plan again"
    ):
        planned.engine("unet", device).load()
    planned.assert_empty()


def test_a_truncated_plan_never_reaches_tensorrt(plan, simulated, device) -> None:
    planned = plan(fresh=True)
    path = planned.bundle.path(planned.records["unet"].file)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptError, match="the manifest says"):
        planned.engine("unet", device).load()
    assert simulated.deserialized == []


def test_a_plan_is_compared_with_the_manifest(planned, device, simulated) -> None:
    """A plan with the right digest may still be another component's, or have other profiles."""
    encoder = planned.records["vae_encoder"]
    key = planned.records["unet"].key
    shapes = {name: tuple((size[0] + 1, *size[1:]) for size in sizes) for name, sizes in key.profiles[0].shapes.items()}
    moved = msgspec.structs.replace(
        key, profiles=(msgspec.structs.replace(key.profiles[0], shapes=shapes), *key.profiles[1:])
    )
    twice = msgspec.structs.replace(key, profiles=key.profiles * 2)
    for record, text in (
        (
            _changed(planned, "unet", file=encoder.file, chunks=encoder.chunks),
            "deep_feature is absent, the graph has output of type float",
        ),
        (_changed(planned, "unet", key=twice), f"it has {len(key.profiles)} profiles, not {2 * len(key.profiles)}"),
        (_changed(planned, "unet", key=moved), "profile 0 takes"),
    ):
        with pytest.raises(IncompatibleError, match=f"not the plan of unet.*{text}.*build it again"):
            TrtEngine(planned.bundle, record, device).load()
        planned.assert_empty()


def test_a_failed_run_is_explained_and_the_next_one_works(planned, device, simulated) -> None:
    engine, reference, inputs = planned.engine("unet", device), planned.reference("unet"), planned.inputs("unet")
    engine.load()
    engine.bind(planned.constants(inputs))
    simulated.fail_next_execute()
    with pytest.raises(EngineError, match=r"running unet: TensorRT failed: .*invalid argument"):
        engine.infer(planned.step(inputs))
    for _ in range(3):
        planned.assert_near(engine.infer(planned.step(inputs)), planned.run(reference, inputs))
    engine.unload()
