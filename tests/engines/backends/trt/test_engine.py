"""TensorRT engines on the simulated device: results, copies, and captured graphs."""

import logging

import numpy as np
import pytest

from sdxl_trt.engines.backends.trt.context import MAX_SHAPES
from sdxl_trt.engines.errors import SizeError


@pytest.mark.parametrize(
    "name", ["unet", "refiner_unet", "text_encoder", "text_encoder_2", "vae_decoder", "vae_encoder"]
)  # fmt: skip
def test_every_component_equals_onnx_runtime(planned, device, name: str) -> None:
    engine, reference = planned.engine(name, device), planned.reference(name)
    engine.load()
    for seed in range(3):  # without a graph, captured, launched again
        inputs = planned.inputs(name, seed)
        if "timestep" in inputs:
            planned.assert_near(planned.run(engine, inputs), planned.run(reference, inputs))
        else:
            planned.assert_near(engine.infer(inputs), reference.infer(inputs))
    engine.unload()


def test_new_constants_keep_their_addresses(planned, device, simulated) -> None:
    engine, reference = planned.engine("unet", device), planned.reference("unet")
    engine.load()
    for seed in range(4):
        inputs = planned.inputs("unet", seed)
        engine.bind(planned.constants(inputs))
        reference.bind(planned.constants(inputs))
        for _ in range(2):
            planned.assert_near(engine.infer(planned.step(inputs)), reference.infer(planned.step(inputs)))
    assert simulated.calls["cudaStreamBeginCapture"] == 1
    engine.unload()


def test_guidance_off_uses_the_first_rows_of_the_constants(planned, device, simulated) -> None:
    """Rows change from 2 to 1 and back during a phase; nothing is bound or captured again."""
    engine, reference, inputs = planned.engine("unet", device), planned.reference("unet"), planned.inputs("unet")
    engine.load()
    engine.bind(planned.constants(inputs))
    reference.bind(planned.constants(inputs))
    for rows in (2, 2, 1, 1, 2, 1, 2):
        step = {name: array[:rows] for name, array in planned.step(inputs).items()}
        planned.assert_near(engine.infer(step), reference.infer(step))
    assert simulated.calls["cudaGraphInstantiate"] == 2
    assert simulated.calls["cudaGraphLaunch"] == 5
    engine.unload()


def test_a_static_plan_switches_between_its_profiles(plan, device, simulated) -> None:
    planned = plan(height=16, width=16, batch=1, tokens=77, static=True)
    assert len(planned.records["unet"].key.profiles) == 2
    engine, reference = planned.engine("unet", device), planned.reference("unet")
    engine.load()
    for rows in (2, 1, 2, 1, 1, 2):
        inputs = planned.inputs("unet", rows, rows=rows)
        planned.assert_near(planned.run(engine, inputs), planned.run(reference, inputs))
    with pytest.raises(SizeError, match=r"rows 1, height 8 \(16 pixels\).* or rows 2, .*rows 3, height 8"):
        planned.run(engine, planned.inputs("unet", rows=3))
    engine.unload()


def test_many_shapes_share_a_few_contexts(planned, device, simulated) -> None:
    engine, reference = planned.engine("unet", device), planned.reference("unet")
    engine.load()
    for turn in range(2):
        for height in (8, 12, 16, 20, 24):
            for tokens in (77, 154):
                inputs = planned.inputs("unet", turn, height=height, tokens=tokens)
                planned.assert_near(planned.run(engine, inputs), planned.run(reference, inputs))
    assert simulated.living["IExecutionContext"] == MAX_SHAPES
    engine.unload()


def test_an_input_overrides_a_constant_for_one_call(planned, device) -> None:
    engine, reference = planned.engine("unet", device), planned.reference("unet")
    engine.load()
    inputs, other = planned.inputs("unet"), planned.inputs("unet", 1)
    for each in (engine, reference):
        each.bind(planned.constants(inputs))
    for step in (
        planned.step(inputs),
        planned.step(inputs) | {"text_embeds": other["text_embeds"]},
        planned.step(inputs),
    ):
        planned.assert_near(engine.infer(step), reference.infer(step))
    engine.unload()


def test_only_requested_outputs_are_copied_back(planned, device, simulated) -> None:
    engine, inputs = planned.engine("text_encoder_2", device), planned.inputs("text_encoder_2")
    engine.load()
    whole = engine.infer(inputs)
    simulated.since()
    part = engine.infer(inputs, ["text_embeds"])
    assert list(part) == ["text_embeds"]
    assert simulated.since() == {
        "HostToDevice": sum(array.nbytes for array in inputs.values()),
        "DeviceToHost": whole["text_embeds"].nbytes,
    }
    np.testing.assert_array_equal(part["text_embeds"], whole["text_embeds"])
    engine.unload()


def test_the_caller_owns_the_results(planned, device) -> None:
    engine, inputs = planned.engine("vae_decoder", device), planned.inputs("vae_decoder")
    engine.load()
    first = engine.infer(inputs)["sample"]
    kept = first.copy()
    first[:] = 0
    np.testing.assert_array_equal(engine.infer(inputs)["sample"], kept)
    engine.unload()
    np.testing.assert_array_equal(first, 0)


def test_a_step_copies_only_latents_timestep_and_prediction(planned, device, simulated) -> None:
    engine, inputs = planned.engine("unet", device), planned.inputs("unet")
    engine.load()
    simulated.since()
    engine.bind(planned.constants(inputs))
    assert simulated.since() == {"HostToDevice": sum(array.nbytes for array in planned.constants(inputs).values())}
    before = len(simulated.transfers)
    for _ in range(5):
        prediction = engine.infer(planned.step(inputs))["out_sample"]
    sample, timestep = inputs["sample"].nbytes, inputs["timestep"].nbytes
    step = [("HostToDevice", sample), ("HostToDevice", timestep), ("DeviceToHost", prediction.nbytes)]
    assert simulated.transfers[before:] == step * 5
    assert simulated.calls["cudaStreamSynchronize"] == 1 + 5
    engine.unload()


def test_a_graph_is_captured_once_per_shape_and_then_launched(planned, device, simulated) -> None:
    engine = planned.engine("unet", device)
    engine.load()
    for height in (8, 16):
        inputs = planned.inputs("unet", height=height)
        engine.bind(planned.constants(inputs))
        for _ in range(4):
            engine.infer(planned.step(inputs))
    assert simulated.calls["cudaStreamBeginCapture"] == simulated.calls["cudaGraphInstantiate"] == 2
    assert simulated.calls["cudaGraphLaunch"] == 6
    assert simulated.executed == ["unet"] * 8
    engine.unload()


def test_a_single_run_captures_nothing(planned, device, simulated) -> None:
    engine = planned.engine("vae_decoder", device)
    engine.load()
    engine.infer(planned.inputs("vae_decoder"))
    assert simulated.calls["cudaStreamBeginCapture"] == 0
    engine.unload()


@pytest.mark.parametrize("failure", ["fail_capture", "fail_next_execute"])
def test_a_failed_capture_warns_once_and_the_engine_continues(planned, device, simulated, caplog, failure: str) -> None:
    engine, reference = planned.engine("unet", device), planned.reference("unet")
    engine.load()
    inputs = planned.inputs("unet")
    planned.assert_near(planned.run(engine, inputs), planned.run(reference, inputs))
    getattr(simulated, failure)()
    with caplog.at_level(logging.WARNING, "sdxl_trt"):
        for seed in range(4):
            inputs = planned.inputs("unet", seed, height=16 if seed == 3 else 8)
            planned.assert_near(planned.run(engine, inputs), planned.run(reference, inputs))
    assert len(caplog.records) == 1
    assert "no CUDA graph: running unet" in caplog.text
    assert simulated.calls["cudaStreamBeginCapture"] == 1
    engine.unload()
