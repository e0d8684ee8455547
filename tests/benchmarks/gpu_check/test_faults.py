"""Every check of gpu-check fails for a fault that is planted in the simulated device."""

import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from sdxl_trt.benchmarks.gpu_check.checks import Check, Workplace, all_checks, memory, pictures, plans, timing
from sdxl_trt.benchmarks.gpu_check.checks.findings import Failed
from sdxl_trt.benchmarks.gpu_check.child import run_check
from sdxl_trt.benchmarks.measure.gpu_record import CheckResult
from sdxl_trt.engines.backends.trt import plan_stream
from sdxl_trt.engines.backends.trt.engine import TrtEngine
from sdxl_trt.engines.bundle.bundle import read_bundle, write_manifest
from sdxl_trt.engines.bundle.profile import fixed
from sdxl_trt.engines.plans.sizes import component_profiles
from sdxl_trt.engines.residency.pool import EnginePool

pytestmark = pytest.mark.slow
ResultOf = Callable[[str], CheckResult]
Plant = Callable[[Any, pytest.MonkeyPatch, Workplace], None]


def _component(*names: str, **facts: Any) -> Callable[[Any], bool]:
    """Return whether an execution is one of these components', with these facts."""

    def match(execution: Any) -> bool:
        return execution.plan.component in names and all(getattr(execution, key) == facts[key] for key in facts)

    return match


def _rows(rows: int) -> Callable[[Any], bool]:
    return lambda execution: execution.shapes.get("sample", (0,))[0] == rows and _is_base(execution)


def _is_base(execution: Any) -> bool:
    return bool(execution.plan.component == "unet")


def _small(execution: Any) -> bool:
    return "unet" in execution.plan.component and execution.shapes["sample"][2] < 16


def _long(execution: Any) -> bool:
    return "unet" in execution.plan.component and execution.shapes["encoder_hidden_states"][1] == 231


def _after(residency: str, plant: Plant) -> Plant:
    """Plant a fault after the run under `residency`, which stays right."""

    def late(device: Any, patch: pytest.MonkeyPatch, workplace: Workplace) -> None:
        workplace.run("tensorrt", residency)
        plant(device, patch, workplace)

    return late


def _spoil(match: Callable[[Any], bool], *more: Any) -> Plant:
    return lambda device, patch, workplace: device.spoil(match, *more)


def _no_binding(device: Any, patch: pytest.MonkeyPatch, workplace: Workplace) -> None:
    sys.modules["tensorrt"] = None  # type: ignore[assignment] # the device restores it; a patch would put it back later


def _no_build(device: Any, patch: pytest.MonkeyPatch, workplace: Workplace) -> None:
    device.compute_capability = (9, 0)
    patch.setattr(plans, "build_plans", lambda *_, **__: None)


def _small_estimate(device: Any, patch: pytest.MonkeyPatch, workplace: Workplace) -> None:
    """Let the records say less than the plans take; the difference exceeds what CUDA may take for itself."""
    from simulated import plans as simulated_plans

    patch.setattr(simulated_plans.Plan, "needed", lambda plan, profile, shapes: plan.activations[profile])
    patch.setattr("simulated.engines.EngineState.activations", lambda state, profile: 2 << 30)


def _another_swap(device: Any, patch: pytest.MonkeyPatch, workplace: Workplace) -> None:
    enter = EnginePool._enter

    def twice(pool: EnginePool, name: str, engine: Any) -> None:
        enter(pool, name, engine)
        pool.swaps += name == "refiner_unet"

    patch.setattr(EnginePool, "_enter", twice)


def _large_limit(device: Any, patch: pytest.MonkeyPatch, workplace: Workplace) -> None:
    patch.setattr(plans, "LARGE", 0)
    device.spoil(_component("refiner_unet"), math.nan)


def _all_weights(device: Any, patch: pytest.MonkeyPatch, workplace: Workplace) -> None:
    patch.setattr(memory, "LEAST_STREAMABLE", 0)
    device.ignores_budgets = True


def _no_reader(device: Any, patch: pytest.MonkeyPatch, workplace: Workplace) -> None:
    """Let loads warn as they do if TensorRT takes no reader; plans as small as these are never read in pieces."""
    load = TrtEngine.load

    def warned(engine: TrtEngine) -> None:
        logging.getLogger(plan_stream.__name__).warning("the plan is read whole: TensorRT did not take it in pieces")
        load(engine)

    patch.setattr(TrtEngine, "load", warned)


def _no_memory(device: Any, patch: pytest.MonkeyPatch, workplace: Workplace) -> None:
    patch.setattr(plans, "used_memory", lambda: 0)


FAULTS: dict[str, tuple[Plant, str]] = {
    "the bindings import": (_no_binding, "needs tensorrt"),
    "the environment is known": (lambda device, *_: device.sticky_after(0), "cudaErrorIllegalAddress"),
    "plans are built: text encoders and autoencoder": (_no_build, "compute capability is 9.0"),
    "plans are built: base UNet": (_no_build, "compute capability is 9.0"),
    "plans are built: refiner UNet": (_no_build, "compute capability is 9.0"),
    "plans load and unload": (lambda device, *_: device.keep_after_unloading(32 << 20), "allocated; at most"),
    "a whole picture matches ort-cpu": (_spoil(_component("vae_decoder")), "45 dB are required"),
    "CUDA graphs are used": (lambda device, *_: device.fail_capture(), "could not be captured"),
    "with and without CUDA graphs, the same latents": (_spoil(_component("unet", captured=True)), "what its plan"),
    "an engine loads while another captures": (lambda device, *_: device.fail_capture(), "a capture failed"),
    "residencies give the same picture": (_after("swap", _spoil(_component("refiner_unet"))), "resident against"),
    "one change of UNets": (_another_swap, "1 is expected; loads"),
    "memory is what was planned": (_small_estimate, "is expected"),
    "plans over 2 GiB load": (_large_limit, "refiner_unet computes NaN"),
    "time per step": (_spoil(_component("vae_decoder"), math.nan), "NaN or infinity"),
    "the handoff": (_spoil(_component("refiner_unet"), None, 1), "the runs differ"),
    "guidance on and off: base UNet": (_spoil(_rows(1), None, 2), "a fresh engine"),
    "guidance on and off: refiner UNet": (_spoil(_component("refiner_unet"), math.nan, 1), "a fresh engine"),
    "profiles of one plan agree: base UNet": (_spoil(_component("unet", profile=1)), "lowest cosine -1"),
    "profiles of one plan agree: refiner UNet": (_spoil(_component("refiner_unet", profile=1)), "lowest cosine -1"),
    "the same plan gives the same latents": (_after("swap", _spoil(_is_base, None, 1)), "equal bits"),
    "half of the weights streamed: base UNet": (_all_weights, "less is expected"),
    "half of the weights streamed: refiner UNet": (
        _spoil(_component("refiner_unet", streaming=True)), "compute the same"),
    "every component matches ONNX Runtime: text encoders and autoencoder": (
        _spoil(_component("text_encoder")), "text_encoder hidden_states"),
    "every component matches ONNX Runtime: base UNet": (_spoil(_is_base), "unet out_sample differs"),
    "every component matches ONNX Runtime: refiner UNet": (
        _spoil(_component("refiner_unet")), "refiner_unet out_sample differs"),
    "sizes off the optimum: base UNet": (_spoil(_small, math.nan), "NaN or infinity at"),
    "sizes off the optimum: refiner UNet": (_spoil(_small), "lowest cosine -1"),
    "154 and 231 tokens: base UNet": (_spoil(_long), "231 tokens"),
    "154 and 231 tokens: refiner UNet": (_spoil(_long, math.nan), "231 tokens"),
}  # fmt: skip
APART = {"fused attention: base UNet", "fused attention: refiner UNet", "8 bits against fp16", "two operator sets"}
"""Checks whose faults have tests of their own, below."""


def test_every_check_has_a_fault() -> None:
    names = {check.name.removeprefix("tensorrt: ") for check in all_checks() if check.name.startswith("tensorrt: ")}
    assert names == FAULTS.keys() | APART


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(
    name: str, result_of: ResultOf, workplace: Workplace, simulated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, said = FAULTS[name]
    simulated.leaks_matter = False
    plant(simulated, monkeypatch, workplace)
    result = result_of(f"tensorrt: {name}")
    assert result.outcome == "FAILED", result.seen
    assert said in result.seen


@pytest.mark.parametrize(("plant", "said"), [(_no_reader, "loaded in pieces"), (_no_memory, "cannot be read")])
def test_more_faults_of_loading_are_found(
    plant: Plant, said: str, result_of: ResultOf, workplace: Workplace, simulated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(simulated, monkeypatch, workplace)
    result = result_of("tensorrt: plans load and unload")
    assert (result.outcome, said in result.seen) == ("FAILED", True), result.seen


def test_a_nan_of_a_component_reaches_the_report(result_of: ResultOf, simulated: Any) -> None:
    simulated.spoil(_is_base, math.nan)
    result = result_of("tensorrt: every component matches ONNX Runtime: base UNet")
    assert result.outcome == "FAILED"
    assert "worst unet out_sample" in result.seen
    assert msgspec.json.decode(msgspec.json.encode(result), type=CheckResult) == result


def _attention(workplace: Workplace, activations: int) -> Any:
    """Return the finding for a base of SDXL's widths whose plan has these activations."""
    component = read_bundle(workplace.root).manifest.components["unet"]
    config = component.config | {"block_out_channels": [320, 640, 1280], "attention_head_dim": [5, 10, 20]}
    component = msgspec.structs.replace(component, config=config, precision="fp16")
    record = workplace.records("tensorrt", "unet")["unet"]
    axes = {"rows": fixed(2), "height": fixed(128), "width": fixed(128), "tokens": fixed(77)}
    profiles = component_profiles({spec.name: spec.shape for spec in component.inputs}, [axes])
    record = msgspec.structs.replace(
        record,
        key=msgspec.structs.replace(record.key, profiles=profiles),
        memory=msgspec.structs.replace(record.memory, activations=activations),
    )
    return plans.attention_finding(component, record)


def test_attention_is_fused_if_its_scores_do_not_fit_into_the_activations(workplace: Workplace) -> None:
    """At 1024² the scores of SDXL's second level are 2 rows × 10 heads × 4096² × 2 bytes; TensorRT builds 303 MB."""
    found = _attention(workplace, 303_000_000)
    assert found.figures[1].value == 2 * 10 * 4096**2 * 2
    with pytest.raises(Failed, match="attention is not fused"):
        _attention(workplace, 2 * 10 * 4096**2 * 2)


def test_operator_sets_are_compared(
    workplace: Workplace, simulated: Any, make_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_bundle("other")
    manifest = read_bundle(other).manifest
    older = {name: msgspec.structs.replace(each, opset=20) for name, each in manifest.components.items()}
    write_manifest(other, msgspec.structs.replace(manifest, components=older))
    workplace.other_opset = other
    result = run_check(Check("both", lambda place: timing.operator_sets("tensorrt", place)), workplace)
    assert result.outcome == "ok", result.seen
    names = [figure.name for figure in result.figures]
    assert names == ["unet, opset 23", "unet, opset 20", "vae_decoder, opset 23", "vae_decoder, opset 20",
                     "lowest cosine"]  # fmt: skip
    simulated.spoil(_component("vae_decoder"), None, 2)
    result = run_check(Check("both", lambda place: timing.operator_sets("tensorrt", place)), workplace)
    assert (result.outcome, "must compute the same" in result.seen) == ("FAILED", True)
    assert [figure.name for figure in result.figures] == names, "a failure keeps its figures"
    decoder = timing._decoder(read_bundle(workplace.root), "tensorrt")
    monkeypatch.setattr(timing, "_decoder", lambda *_: f"another {decoder}")
    result = run_check(Check("both", lambda place: timing.operator_sets("tensorrt", place)), workplace)
    assert (result.outcome, result.seen.endswith("; another vae_decoder has no second export")) == ("ok", True)


def test_eight_bits_are_compared_with_floats(
    workplace: Workplace, simulated: Any, make_bundle: Callable[..., Path]
) -> None:
    other = make_bundle("other")
    manifest = read_bundle(other).manifest
    parts = {name: msgspec.structs.replace(each, precision="int8") if each.kind == "unet" else each
             for name, each in manifest.components.items()}  # fmt: skip
    write_manifest(other, msgspec.structs.replace(manifest, components=parts))
    workplace.eight_bit = other
    result = run_check(Check("8", lambda place: timing.eight_bits("tensorrt", place)), workplace)
    assert result.outcome == "ok", result.seen
    names = [figure.name for figure in result.figures]
    assert names[:5] == ["base UNet step, fp32", "base UNet step, int8", "base UNet, 8 bits / floats",
                         "base UNet, PSNR of a step", "base UNet, cosine"]  # fmt: skip
    assert "refiner cosine 1.000000" in result.seen
    simulated.spoil(_component("refiner_unet"), None, 2)
    result = run_check(Check("8", lambda place: timing.eight_bits("tensorrt", place)), workplace)
    assert (result.outcome, "0.996 is required: refiner" in result.seen) == ("FAILED", True), result.seen
    assert [figure.name for figure in result.figures] == names, "a failure keeps its figures"


def test_a_provider_of_onnxruntime_that_does_not_start_is_a_failure(
    result_of: ResultOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "choose_provider", lambda *_: SimpleNamespace(name="CUDAExecutionProvider"))
    result = result_of("ort-cuda: a whole picture matches ort-cpu")
    assert (result.outcome, result.seen.partition(":")[0]) == ("FAILED", "IncompatibleError")
