"""Bundles in 8 bits: what every part of engines/ knows of int8 and fp8, on a bundle that was quantized in the tests."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import onnxruntime
import pytest
from safetensors.numpy import save_file
from small_models.eight_bit import make_eight_bit

from sdxl_trt.benchmarks.gpu_check.checks.likeness import limits_of
from sdxl_trt.benchmarks.quality.limits import STAGES, limit_of
from sdxl_trt.benchmarks.roofline import roofline
from sdxl_trt.engines.adapters.file import open_lora
from sdxl_trt.engines.adapters.scaled import ScaledLora
from sdxl_trt.engines.backends import open as providers
from sdxl_trt.engines.backends.mapped import engine as mapped_engine
from sdxl_trt.engines.backends.ort import engine as ort_engine
from sdxl_trt.engines.backends.ort.providers import ExecutionProvider
from sdxl_trt.engines.backends.trt.device import open_device
from sdxl_trt.engines.bundle.bundle import Bundle, read_bundle
from sdxl_trt.engines.bundle.manifest import EIGHT_BIT, Precision
from sdxl_trt.engines.bundle.tensor_table import read_table, slot_dtype
from sdxl_trt.engines.errors import IncompatibleError
from sdxl_trt.engines.inspection import compare
from sdxl_trt.engines.inspection.report import inspect_bundle
from sdxl_trt.engines.plans.sizes import profiles_of, stage_sizes
from sdxl_trt.engines.residency import activations, needs
from sdxl_trt.engines.residency.opening import open_pool
from sdxl_trt.mini.embedded import bundle_path

UNETS = ("unet", "refiner_unet")
PLAIN = read_bundle(bundle_path())


@pytest.fixture(scope="module")
def bundle(partly_int8_bundle: Path) -> Bundle:
    return read_bundle(partly_int8_bundle)


@pytest.fixture
def lora(tmp_path: Path) -> ScaledLora:
    """Return a LoRA for one layer of the base's UNet."""
    module = next(name for name in read_table(PLAIN, "unet").slots if name.endswith("to_q"))
    outputs, inputs = read_table(PLAIN, "unet").shapes[f"{module}.weight"]
    shapes = {"A": (2, inputs), "B": (outputs, 2)}
    tensors = {f"unet.{module}.lora_{part}.weight": np.ones(shape, np.float32) for part, shape in shapes.items()}
    save_file(tensors, tmp_path / "ink.safetensors")
    return ScaledLora(open_lora(tmp_path / "ink.safetensors"), 1.0)


def _as(bundle: Bundle, precision: Any, name: str = "unet") -> Bundle:
    parts = dict(bundle.manifest.components)
    parts[name] = msgspec.structs.replace(parts[name], precision=precision)
    return Bundle(bundle.root, msgspec.structs.replace(bundle.manifest, components=parts))


def test_every_table_of_precisions_has_all_of_them() -> None:
    every = set(get_args(Precision))
    assert needs._ORT_WEIGHTS.keys() == compare._LIMITS.keys() == roofline._RATES.keys() == every
    assert activations._ITEM.keys() == every - {*EIGHT_BIT}, "activations are floats"
    for stage in STAGES:
        limits = [limit_of(stage, {"fp16", precision}) for precision in ("fp16", "bf16", "int8", "fp8")]
        assert limits == sorted(limits, reverse=True)
        assert limit_of(stage, {"bf16", "int8", "fp32"}) == limit_of(stage, {"int8"}), "the coarsest decides"
    assert limits_of({"fp16", "int8"}, deep=True).pixels == limit_of("pixels", {"int8"})
    assert limits_of({"fp16"}, deep=True).pixels == limit_of("pixels", {"bf16"})


@pytest.mark.parametrize("name", UNETS)
def test_the_table_lists_8_bit_tensors_with_their_published_shapes(bundle: Bundle, name: str) -> None:
    table, plain = read_table(bundle, name), read_table(PLAIN, name)
    assert table.shapes == plain.shapes
    assert {**table.slots_by_module} == {**plain.slots_by_module}
    quantized = [tensor for tensor in table.tensors if tensor.dtype == "int8"]
    component = bundle.manifest.components[name]
    assert component.quantization is not None
    assert len(quantized) == component.quantization.linears
    for tensor in quantized:
        assert tensor.nbytes == np.prod(tensor.shape)
        assert tensor.offset is not None
        start, other = tensor.offset, plain.by_name[tensor.name]
        data, floats = (np.memmap(each.path(each.manifest.components[name].weights), np.uint8, "r")
                        for each in (bundle, PLAIN))  # fmt: skip
        bits = data[start : start + tensor.nbytes].view(np.int8).astype(float)
        exact = floats[other.offset : (other.offset or 0) + other.nbytes].view(np.float16).astype(float)
        assert np.corrcoef(bits, exact)[0, 1] > 0.9, "rounded at another place, or in another order"
    assert slot_dtype(component.precision) == slot_dtype("fp8") == "float16"


def test_a_session_in_8_bits_has_its_settings(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(ExecutionProvider, "open", lambda *given: seen.append(given[3]) or object())
    monkeypatch.setattr(ort_engine, "saturates", lambda _: True)
    for which in (PLAIN, bundle, _as(bundle, "fp8")):
        engine = ort_engine.OrtEngine(which, "unet")
        engine.load()
        engine.unload()
    plain, int8, fp8 = seen
    levels = onnxruntime.GraphOptimizationLevel
    assert int8.get_session_config_entry("session.x64quantprecision") == "1"
    for options in (plain, fp8):
        with pytest.raises(RuntimeError):
            options.get_session_config_entry("session.x64quantprecision")
    assert fp8.graph_optimization_level == levels.ORT_ENABLE_BASIC
    assert {plain.graph_optimization_level, int8.graph_optimization_level} == {levels.ORT_ENABLE_ALL}


@pytest.mark.parametrize("provider", ["ort-cpu", "ort-cuda", "ort-tensorrt"])
def test_a_lora_on_an_8_bit_unet_is_refused_before_anything_is_read(
    provider: str, bundle: Bundle, lora: ScaledLora, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ort_engine.OrtEngine(bundle, "unet", provider)  # type: ignore[arg-type]
    for reading in ("plan_patch", "verify_file"):
        monkeypatch.setattr(mapped_engine, reading, lambda *_: pytest.fail("read"))
    with pytest.raises(IncompatibleError) as raised:
        engine.adapt([lora])
    assert str(raised.value) == (
        "unet is int8, and LoRAs cannot change 8-bit weights on ONNX Runtime; fuse them at export (export-engines"
        " --lora FILE --int8), use TensorRT plans built with --lora-rank 128, or export with --fp16"
    )
    engine.adapt([])
    with pytest.raises(IncompatibleError, match=r"unet is fp8, .* FILE --fp8"):
        ort_engine.OrtEngine(_as(bundle, "fp8"), "unet").adapt([lora])


def test_the_cuda_provider_warns_that_8_bits_save_no_time(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    for opened, provider in ((PLAIN, "ort-cuda"), (bundle, "ort-cpu")):
        providers.open_backend(opened, provider)
    assert not caplog.messages
    with caplog.at_level(logging.WARNING):
        providers.open_backend(bundle, "ort-cuda")
    (said,) = caplog.messages
    assert said.startswith("unet, refiner_unet: ONNX Runtime's CUDA provider computes 8-bit layers in floating point")


def test_a_gpu_without_a_precision_is_refused_before_plans_are_used(bundle: Bundle, simulated: Any) -> None:
    simulated.compute_capability = (8, 6)
    parts = _as(bundle, "fp8").manifest.components
    with open_device("tensorrt") as device:
        device.require_kernels(bundle.manifest.components)
        with pytest.raises(IncompatibleError, match=r"^unet is fp8, which .* \(compute capability 8\.6\) .* 8\.9 is"):
            device.require_kernels(parts)
        simulated.compute_capability = (8, 9)
        device.require_kernels(parts)


def test_opening_plans_asks_the_device_and_closes_it(bundle: Bundle, simulated: Any, tmp_path: Path) -> None:
    simulated.compute_capability = (8, 6)
    planned = read_bundle(simulated.bundle(bundle.root, tmp_path / "bundle"))
    with open_pool(planned, "tensorrt") as pool:
        assert pool.records.keys() >= {*UNETS}
    with pytest.raises(IncompatibleError, match="refiner_unet is fp8"):
        open_pool(_as(planned, "fp8", "refiner_unet"), "tensorrt")


def test_memory_counts_8_bit_weights_and_float_activations(bundle: Bundle) -> None:
    component, plain = (each.manifest.components["unet"] for each in (bundle, PLAIN))
    profiles = profiles_of(component, stage_sizes(bundle.manifest), 8)
    assert profiles == profiles_of(plain, stage_sizes(PLAIN.manifest), 8)
    assert activations.estimate_each(component, profiles) == activations.estimate_each(plain, profiles)
    hosts = {each: needs.host_need(_as(PLAIN, each).manifest.components["unet"]) for each in ("fp32", "fp16", "int8")}
    assert hosts["int8"] < 0.5 * hosts["fp32"] < 0.5 * hosts["fp16"]
    for provider in ("tensorrt", "ort-cpu", "ort-cuda"):
        found, usual = (needs.need_of(each.manifest, "unet", provider, stage_sizes(each.manifest))
                        for each in (bundle, PLAIN))  # fmt: skip
        assert (found.activations, found.io) == (usual.activations, usual.io)
        assert found.weights == (component.weights.size if provider != "ort-cpu" else needs.host_need(component))


def test_a_decoder_with_fp32_floats_is_planned_in_tiles_as_one_in_fp32() -> None:
    decoder = PLAIN.manifest.components["vae_decoder"]
    wide = tuple(msgspec.structs.replace(spec, dtype="float32") for spec in decoder.outputs)
    sizes = stage_sizes(PLAIN.manifest)
    sizes = msgspec.structs.replace(sizes, height=msgspec.structs.replace(sizes.height, opt=1024, max=1024))
    found = {name: profiles_of(msgspec.structs.replace(decoder, **changes), sizes, 8) for name, changes in {
        "fp32": {"precision": "fp32"}, "int8": {"precision": "int8", "outputs": wide}, "fp16": {}}.items()}  # fmt: skip
    assert found["int8"] == found["fp32"] != found["fp16"]


def test_the_report_says_what_computes_in_8_bits(bundle: Bundle) -> None:
    report = inspect_bundle(bundle.root)
    text = " ".join(" ".join(report.lines).split())
    assert "base and refiner, int8, made by" in text
    assert ("unet: 22 linear layers in 8 bits, 36 excluded layers and the rest in fp16; calibrated on no pictures"
            in text)  # fmt: skip
    graphs = {graph["component"]: graph for graph in report.json["graphs"]}
    assert (graphs["unet"]["precision"], graphs["unet"]["float_precision"]) == ("int8", "fp16")
    assert graphs["unet"]["quantization"].excluded["conv_in"] == "kept by this test"
    assert graphs["text_encoder"]["quantization"] is None
    assert not [line for line in inspect_bundle(PLAIN.root).lines if "8 bits" in line]


@pytest.mark.parametrize("precision", EIGHT_BIT)
def test_8_bit_graphs_agree_with_floats_within_their_limits(
    precision: str, bundle: Bundle, tmp_path: Path, example: Callable[..., dict[str, Any]]
) -> None:
    if precision == "fp8":
        make_eight_bit(PLAIN.root, tmp_path / "fp8", "fp8")
        bundle = read_bundle(tmp_path / "fp8")
    outputs = []
    for which in (bundle, PLAIN):
        engine = ort_engine.OrtEngine(which, "unet")
        engine.load()
        outputs.append(engine.infer(example(which))["out_sample"].astype(float))
        engine.unload()
    found, exact = outputs
    limits = compare._LIMITS[precision]
    assert 0 < np.abs(found - exact).max() < limits.relative * np.ptp(exact)
    assert (found * exact).sum() / np.linalg.norm(found) / np.linalg.norm(exact) > limits.cosine


@pytest.fixture
def example() -> Callable[..., dict[str, Any]]:
    """Return a function that makes small inputs of the base's UNet."""
    from sdxl_trt.engines.engine import fill_optional, numpy_dtype

    def make(bundle: Bundle) -> dict[str, Any]:
        rng, component = np.random.default_rng(0), bundle.manifest.components["unet"]
        sizes = {"rows": 2, "height": 16, "width": 16, "tokens": 77}
        feed = {spec.name: rng.standard_normal([sizes.get(str(axis), axis) for axis in spec.shape])
                .astype(numpy_dtype(spec)) for spec in component.inputs if not spec.optional}  # fmt: skip
        return feed | fill_optional(component, feed)

    return make
