"""OpenVINO's own in its engine: compiled shapes, precisions, and the embedded pair against ONNX Runtime."""

import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from sdxl_trt.engines.backends.ort.engine import OrtEngine
from sdxl_trt.engines.backends.ov import engine as module
from sdxl_trt.engines.backends.ov import library
from sdxl_trt.engines.backends.ov.engine import OvEngine
from sdxl_trt.engines.bundle.bundle import Bundle, read_bundle
from sdxl_trt.engines.errors import (
    EngineError,
    IncompatibleError,
    UsageError,
)
from sdxl_trt.mini.embedded import bundle_path

Inputs = dict[str, np.ndarray]


@pytest.fixture
def engine(bundle: Bundle) -> OvEngine:
    return OvEngine(bundle, "unet", "fp32")


def _rows(inputs: Inputs, rows: slice) -> Inputs:
    return {name: array[rows] for name, array in inputs.items()}


def test_a_shape_is_compiled_once_while_it_is_kept_and_the_oldest_is_dropped(
    engine: OvEngine, inputs: Inputs, embeds: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = _count(monkeypatch)
    monkeypatch.setattr(module, "_MOST_SHAPES", 2)
    engine.load()
    engine.bind(embeds)
    assert compiled == []
    for rows in (1, 2, 1, 2):
        engine.infer(_rows(inputs, slice(rows)))
    assert [shapes[0] for shapes in compiled] == [("sample", (1, 3)), ("sample", (2, 3))]
    engine.infer(_rows({name: np.repeat(array, 2, 0) for name, array in inputs.items()}, slice(3)))
    assert len(engine._requests) == 2
    engine.infer(inputs)
    assert len(compiled) == 3
    engine.infer(_rows(inputs, slice(1)))
    assert len(compiled) == 4


def test_large_weights_are_kept_for_one_shape_only(
    engine: OvEngine, inputs: Inputs, embeds: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.component = msgspec.structs.replace(engine.component, parameters=1 << 30)
    engine.load()
    engine.bind(embeds)
    for rows in (1, 2):
        engine.infer(_rows(inputs, slice(rows)))
        assert len(engine._requests) == 1


def _count(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    compiled: list[Any] = []
    original = OvEngine._compiled

    def compile_and_count(self: OvEngine, shapes: Any) -> Any:
        compiled.append(shapes)
        return original(self, shapes)

    monkeypatch.setattr(OvEngine, "_compiled", compile_and_count)
    return compiled


def test_a_model_with_other_outputs_than_the_manifest_s_is_never_loaded(engine: OvEngine, inputs: Inputs) -> None:
    outputs = tuple(msgspec.structs.replace(spec, name=f"{spec.name}_2") for spec in engine.component.outputs)
    engine.component = msgspec.structs.replace(engine.component, outputs=outputs)
    for _ in range(2):
        with pytest.raises(EngineError, match=r"unet: OpenVINO reads .* but the manifest says .*out_sample_2"):
            engine.load()
        with pytest.raises(EngineError, match="infer before load"):
            engine.infer(inputs)


def test_outputs_on_the_device_outlive_the_next_call(engine: OvEngine, inputs: Inputs, embeds: Inputs) -> None:
    engine.load()
    engine.bind(embeds)
    held = engine.infer_on_device(inputs)["out_sample"]
    kept = held.handle.copy()
    engine.infer({**inputs, "sample": -inputs["sample"]})
    np.testing.assert_array_equal(held.handle, kept)


def test_a_missing_package_names_the_extra(engine: OvEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    library.openvino_core.cache_clear()
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(IncompatibleError, match=r"pip install 'sdxl-trt\[openvino\]'"):
        engine.load()
    library.openvino_core.cache_clear()


def test_the_precision_is_what_the_processor_has(monkeypatch: pytest.MonkeyPatch) -> None:
    class Core:
        capabilities = ("FP32", "INT8")

        def get_property(self, device: str, name: str) -> tuple[str, ...]:
            assert (device, name) == ("CPU", "OPTIMIZATION_CAPABILITIES")
            return self.capabilities

    monkeypatch.setattr(library, "openvino_core", Core)
    assert [library.settled_precision(asked) for asked in ("auto", "fp32")] == ["fp32", "fp32"]
    with pytest.raises(IncompatibleError, match="does not compute in bf16"):
        library.settled_precision("bf16")
    monkeypatch.setattr(Core, "capabilities", ("FP32", "BF16"))
    assert [library.settled_precision(asked) for asked in ("auto", "fp32", "bf16")] == ["bf16", "fp32", "bf16"]
    with pytest.raises(UsageError, match="choose auto, fp32 or bf16"):
        library.settled_precision("int4")


def _in(bundle: Bundle, precision: str) -> Bundle:
    parts = {"unet": msgspec.structs.replace(bundle.manifest.components["unet"], precision=precision)}
    return Bundle(bundle.root, msgspec.structs.replace(bundle.manifest, components=parts))


@pytest.mark.parametrize("computes", ["fp32", "bf16"])
def test_a_graph_in_8_bit_floats_is_refused(bundle: Bundle, computes: Any) -> None:
    with pytest.raises(IncompatibleError, match="fp8, which OpenVINO does not compute in"):
        OvEngine(_in(bundle, "fp8"), "unet", computes)


def test_a_bf16_graph_is_refused_where_it_would_be_said_to_compute_in_fp32(bundle: Bundle) -> None:
    with pytest.raises(IncompatibleError, match=r"unet is bf16, which OpenVINO does not compute in fp32; .*--fp16"):
        OvEngine(_in(bundle, "bf16"), "unet", "fp32")
    OvEngine(_in(bundle, "bf16"), "unet", "bf16")


PROMPTS = {"input_ids": np.arange(2 * 77).reshape(2, 77) % 300 + 1, "embedding_index": np.zeros((2, 77), np.int64)}


def _pair(name: str, precision: Any = "fp32", root: Path | None = None) -> tuple[OrtEngine, OvEngine]:
    mini = read_bundle(root or bundle_path())
    return OrtEngine(mini, name, standard=True), OvEngine(mini, name, precision)


def _encoder_inputs(width: int) -> Inputs:
    return {**PROMPTS, "embeddings": np.zeros((1, width), np.float16)}


def test_a_text_encoder_is_compiled_once_for_any_number_of_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = _count(monkeypatch)
    reference, engine = _pair("text_encoder_2")
    inputs = _encoder_inputs(64)
    for each in (reference, engine):
        each.load()
    for rows in (2, 1):
        feed = {**_rows(PROMPTS, slice(rows)), "embeddings": inputs["embeddings"]}
        expected, found = reference.infer(feed), engine.infer(feed)
        for name, array in expected.items():
            scale = np.abs(array.astype(np.float32)).max()
            np.testing.assert_allclose(found[name].astype(np.float32), array.astype(np.float32), atol=2e-3 * scale)
    assert compiled == [()]


def test_8_bit_products_are_exact_here_or_the_graph_is_refused(
    partly_int8_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert library.exact_products()
    monkeypatch.setattr(module, "exact_products", lambda: False)
    with pytest.raises(IncompatibleError, match="unet is int8, and this CPU's 8-bit products overflow"):
        _pair("unet", root=partly_int8_bundle)[1].load()
