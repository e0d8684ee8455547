"""Full and shallow UNets on the simulated device: what is kept stays there, for two calls, and graphs stay captured."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from sdxl_trt.engines.adapters.file import open_lora
from sdxl_trt.engines.adapters.scaled import ScaledLora
from sdxl_trt.engines.backends.ort.engine import OrtEngine
from sdxl_trt.engines.bundle.tensor_table import read_table
from sdxl_trt.engines.errors import UsageError

DEEP, OUT = "deep_feature", "out_sample"
FACTOR = np.array([0.5, 1.5], np.float32)
RANK = 8


def _shallow_inputs(planned: Any, inputs: dict[str, Any], new: Any, old: Any) -> dict[str, Any]:
    known = {spec.name for spec in planned.bundle.manifest.components["unet_shallow"].inputs}
    given = {name: value for name, value in inputs.items() if name in known}
    return {**given, "deep_new": new, "deep_old": old, "deep_factor": FACTOR[: len(inputs["sample"])]}


def _reference(planned: Any, calls: list[dict[str, Any]]) -> tuple[list[Any], Any]:
    """Return what the full UNet returns on ONNX Runtime for two calls, and the shallow one after them."""
    full, shallow = planned.reference("unet"), planned.reference("unet_shallow")
    found = [full.infer(call, (OUT, DEEP)) for call in calls]
    old, new = (each[DEEP] for each in found[-2:])
    return [each[OUT] for each in found], shallow.infer(_shallow_inputs(planned, calls[-1], new, old))


def test_a_shallow_step_continues_from_two_full_ones(planned, device) -> None:
    full, shallow = planned.engine("unet", device), planned.engine("unet_shallow", device)
    full.load()
    shallow.load()
    calls = [planned.inputs("unet", seed) for seed in range(3)]
    predictions, expected = _reference(planned, calls)
    kept = []
    for call, prediction in zip(calls, predictions, strict=True):
        host, held = full.infer_keeping(call, [DEEP], [OUT])
        planned.assert_near(host, {OUT: prediction})
        assert held.keys() == {DEEP}
        kept.append(held[DEEP])
    planned.assert_near(shallow.infer(_shallow_inputs(planned, calls[-1], kept[2], kept[1])), expected)
    assert kept[0].handle == kept[2].handle != kept[1].handle
    full.unload()
    shallow.unload()


def test_a_call_that_keeps_nothing_leaves_what_is_kept(planned, device) -> None:
    """A run without guidance, or a preview, may come between."""
    full, shallow = planned.engine("unet", device), planned.engine("unet_shallow", device)
    full.load()
    shallow.load()
    calls = [planned.inputs("unet", seed) for seed in range(2)]
    _, expected = _reference(planned, calls)
    old, new = (full.infer_keeping(call, [DEEP], [OUT])[1][DEEP] for call in calls)
    assert full.infer(planned.inputs("unet", 7)).keys() == {OUT}
    full.infer_keeping(planned.inputs("unet", 8), [], [OUT])
    planned.assert_near(shallow.infer(_shallow_inputs(planned, calls[-1], new, old)), expected)
    full.unload()
    shallow.unload()


def test_what_is_kept_never_crosses_to_the_host(planned, device, simulated) -> None:
    full = planned.engine("unet", device)
    full.load()
    inputs = planned.inputs("unet")
    before = len(simulated.transfers)
    host, _ = full.infer_keeping(inputs, [DEEP], [OUT])
    downloads = [nbytes for way, nbytes in simulated.transfers[before:] if way == "DeviceToHost"]
    assert downloads == [host[OUT].nbytes]
    full.unload()


def test_both_engines_keep_a_graph_for_each_buffer(planned, device, simulated) -> None:
    full, shallow = planned.engine("unet", device), planned.engine("unet_shallow", device)
    full.load()
    shallow.load()
    inputs = planned.inputs("unet")
    old = full.infer_keeping(inputs, [DEEP], [OUT])[1][DEEP]
    for round_ in range(10):
        if round_ == 6:  # two of each context are without a graph, and the first steps may move the activations
            before = simulated.calls["cudaGraphLaunch"]
        new = full.infer_keeping(inputs, [DEEP], [OUT])[1][DEEP]
        shallow.infer(_shallow_inputs(planned, inputs, new, old))
        old = new
    assert simulated.calls["cudaStreamBeginCapture"] == 4
    assert simulated.calls["cudaGraphLaunch"] == before + 8
    full.unload()
    shallow.unload()


def test_buffers_are_allocated_when_they_are_used_and_freed(planned, device, simulated) -> None:
    full = planned.engine("unet", device)
    full.load()
    inputs = planned.inputs("unet")
    full.infer(inputs)
    before = simulated.current_bytes
    (nbytes,) = {full.infer(inputs, [DEEP])[DEEP].nbytes}
    assert simulated.current_bytes == before
    for count in (1, 2, 2):
        full.infer_keeping(inputs, [DEEP], [OUT])
        assert 0 <= simulated.current_bytes - before - count * nbytes < 256 * count
    full.unload()


def test_only_outputs_of_the_graph_can_be_kept(planned, device) -> None:
    full = planned.engine("unet", device)
    full.load()
    with pytest.raises(UsageError, match="deep_thought"):
        full.infer_keeping(planned.inputs("unet"), ["deep_thought"], [OUT])
    full.unload()


def _lora(planned: Any, path: Path, within: tuple[str, ...]) -> ScaledLora:
    """Write a LoRA for the UNet's modules that begin with `within`."""
    rng, tensors = np.random.default_rng(3), {}
    for slot in read_table(planned.bundle, "unet").slots_by_module.values():
        if slot.module.startswith(within):
            shapes = {"down": (2, slot.inputs, *slot.kernel), "up": (slot.outputs, 2, *(1 for _ in slot.kernel))}
            tensors |= {f"unet.{slot.module}.lora_{part}.weight": (rng.standard_normal(shape) / 4).astype(np.float32)
                        for part, shape in shapes.items()}  # fmt: skip
    save_file(tensors, path)
    return ScaledLora(open_lora(path), 1.0)


@pytest.mark.parametrize(
    ("within", "shared"), [(("down_blocks", "up_blocks", "conv_in"), True), (("mid_block",), False)]
)  # fmt: skip
def test_a_lora_changes_both_where_it_changes_the_outermost_level(
    plan, device, tmp_path: Path, within: tuple[str, ...], shared: bool
) -> None:
    planned = plan(lora_rank=RANK)
    lora = _lora(planned, tmp_path / "lora.safetensors", within)
    deep = planned.reference("unet").infer(planned.inputs("unet"), [DEEP])
    for name, changes in (("unet", True), ("unet_shallow", shared)):
        inputs = planned.inputs("unet")
        inputs = inputs if name == "unet" else _shallow_inputs(planned, inputs, deep[DEEP], deep[DEEP])
        patched = OrtEngine(planned.bundle, name)
        patched.adapt([lora])
        patched.load()
        engine = planned.engine(name, device, slot_plan=lambda _rank, name=name: planned.slot_records[name])
        engine.adapt([lora])
        engine.load()
        expected = patched.infer(inputs)
        planned.assert_near(engine.infer(inputs), expected)
        plain = planned.reference(name).infer(inputs)
        assert (np.abs(plain[OUT] - expected[OUT]).max() > 1e-2) == changes
        engine.adapt(())
        engine.load()
        planned.assert_near(engine.infer(inputs), plain)
        engine.unload()
