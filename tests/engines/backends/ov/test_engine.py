"""The Engine protocol on OpenVINO: a graph to compute by hand, and the embedded pair against ONNX Runtime."""

import gc
import sys
import weakref
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from small_models.graphs import tiny_bundle, tiny_graph

from sdxl_trt.engines.backends.ort.engine import OrtEngine
from sdxl_trt.engines.backends.ov import engine as module
from sdxl_trt.engines.backends.ov import library
from sdxl_trt.engines.backends.ov.engine import OvEngine
from sdxl_trt.engines.bundle.bundle import Bundle, read_bundle
from sdxl_trt.engines.engine import DeviceArray
from sdxl_trt.engines.errors import (
    CorruptError,
    EngineError,
    IncompatibleError,
    ResourceError,
    SdxlTrtError,
    UsageError,
)
from sdxl_trt.mini.embedded import bundle_path

Inputs = dict[str, np.ndarray]


@pytest.fixture
def weights(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((3, 5)).astype(np.float32)


@pytest.fixture
def bundle(tmp_path: Path, weights: np.ndarray) -> Bundle:
    return tiny_bundle(tmp_path, weights, tiny_graph(weights))


@pytest.fixture
def engine(bundle: Bundle) -> OvEngine:
    return OvEngine(bundle, "unet", "fp32")


@pytest.fixture
def inputs(rng: np.random.Generator) -> Inputs:
    return {"sample": rng.standard_normal((2, 3)).astype(np.float32), "timestep": np.array([1, 2], np.float32)}


@pytest.fixture
def embeds(rng: np.random.Generator) -> Inputs:
    """Return constants with more rows than a call has."""
    return {"text_embeds": rng.standard_normal((4, 5)).astype(np.float32)}


def _rows(inputs: Inputs, rows: slice) -> Inputs:
    return {name: array[rows] for name, array in inputs.items()}


def test_it_computes_the_graph(engine: OvEngine, inputs: Inputs, embeds: Inputs, weights: np.ndarray) -> None:
    engine.load()
    engine.bind(embeds)
    result = engine.infer(inputs)
    expected = inputs["sample"] @ weights + embeds["text_embeds"][:2]
    np.testing.assert_allclose(result["out_sample"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(result["scaled"], [2, 4])
    assert list(engine.infer(inputs, ["scaled"])) == ["scaled"]


def test_every_number_of_rows_computes_with_its_own_rows(
    engine: OvEngine, rng: np.random.Generator, embeds: Inputs, weights: np.ndarray
) -> None:
    """More shapes than are kept, and back: each call computes its own, with the constants cut to its rows."""
    engine.load()
    engine.bind(embeds)
    for rows in (1, 4, 2, 3, 1, 4, 4, 2):
        sample = rng.standard_normal((rows, 3)).astype(np.float32)
        result = engine.infer({"sample": sample, "timestep": np.zeros(rows, np.float32)})["out_sample"]
        np.testing.assert_allclose(result, sample @ weights + embeds["text_embeds"][:rows], rtol=1e-5, atol=1e-5)


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


def test_the_caller_owns_the_results(engine: OvEngine, inputs: Inputs, embeds: Inputs) -> None:
    engine.load()
    engine.bind(embeds)
    first = engine.infer(inputs)["out_sample"]
    held = engine.infer_on_device(inputs)["out_sample"]
    kept = first.copy()
    first[:] = 0
    np.testing.assert_array_equal(engine.infer(inputs)["out_sample"], kept)
    engine.infer({**inputs, "sample": -inputs["sample"]})
    np.testing.assert_array_equal(held.handle, kept)


def test_outputs_that_are_kept_are_inputs_of_a_later_call(engine: OvEngine, inputs: Inputs, embeds: Inputs) -> None:
    engine.load()
    engine.bind(embeds)
    out, kept = engine.infer_keeping(inputs, {"out_sample"}, ["scaled"])
    again, other = engine.infer_keeping({**inputs, "sample": -inputs["sample"]}, {"out_sample"}, ["scaled"])
    assert (list(out), list(kept)) == (["scaled"], ["out_sample"])
    np.testing.assert_array_equal(kept["out_sample"].handle, engine.infer(inputs)["out_sample"])
    engine.bind({})
    fed = engine.infer({**inputs, "text_embeds": kept["out_sample"]})["out_sample"]
    np.testing.assert_array_equal(fed, engine.infer({**inputs, "text_embeds": kept["out_sample"].handle})["out_sample"])
    assert not np.array_equal(other["out_sample"].handle, kept["out_sample"].handle)
    np.testing.assert_array_equal(out["scaled"], again["scaled"])


def test_an_array_of_another_backend_is_refused(engine: OvEngine, inputs: Inputs) -> None:
    engine.load()
    foreign = DeviceArray((2, 5), np.dtype(np.float32), object(), "ort-cpu")
    with pytest.raises(UsageError, match="text_embeds is on ort-cpu, but this engine runs on openvino"):
        engine.infer({**inputs, "text_embeds": foreign})


def test_wrong_calls_are_named(engine: OvEngine, inputs: Inputs, embeds: Inputs) -> None:
    with pytest.raises(EngineError, match=r"unet: infer before load; call load\(\) first"):
        engine.infer(inputs)
    engine.load()
    with pytest.raises(UsageError, match=r"\['sample', 'timestep'\] given, but the graph takes.*text_embeds"):
        engine.infer(inputs)
    engine.bind(embeds)
    with pytest.raises(UsageError, match="float64 given"):
        engine.infer({**inputs, "sample": np.zeros((2, 3))})
    with pytest.raises(UsageError, match="expected"):
        engine.infer({**inputs, "sample": np.zeros((2, 4), np.float32)})
    with pytest.raises(EngineError, match="running unet: OpenVINO failed"):
        engine.infer(inputs, ["no_such_output"])


@pytest.mark.parametrize("name", ["model.onnx", "weights.data"])
def test_a_changed_byte_is_found_before_openvino_sees_it(
    engine: OvEngine, bundle: Bundle, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "place_weights", lambda *_: pytest.fail("OpenVINO got the damaged file"))
    content = bytearray((bundle.root / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle.root / name).write_bytes(bytes(content))
    with pytest.raises(CorruptError, match=f"{name}.*sha256"):
        engine.load()


def test_a_graph_that_openvino_rejects_is_explained(tmp_path: Path, weights: np.ndarray) -> None:
    unknown = tiny_graph(weights).replace(b"MatMul", b"MatFul")
    with pytest.raises(EngineError, match=r"loading unet: OpenVINO failed: .*MatFul") as caught:
        OvEngine(tiny_bundle(tmp_path, weights, unknown), "unet", "fp32").load()
    assert "\n" not in str(caught.value)


def test_unload_frees_the_map_and_an_engine_loads_again(engine: OvEngine, inputs: Inputs, embeds: Inputs) -> None:
    engine.load()
    engine.bind(embeds)
    before = engine.infer(inputs)["out_sample"]
    assert engine._weights is not None
    mapped = weakref.ref(engine._weights)
    engine.unload()
    engine.unload()
    gc.collect()
    assert mapped() is None
    with pytest.raises(EngineError, match="infer before load"):
        engine.infer(inputs)
    engine.prefetch()
    engine.load()
    with pytest.raises(UsageError, match="text_embeds"):
        engine.infer(inputs)  # the bound inputs were freed too
    engine.bind(embeds)
    np.testing.assert_array_equal(engine.infer(inputs)["out_sample"], before)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("std::bad_alloc")])
def test_out_of_memory_is_a_resource_error(
    engine: OvEngine, inputs: Inputs, embeds: Inputs, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    engine.load()
    engine.bind(embeds)
    monkeypatch.setattr(engine, "_request", fail)
    with pytest.raises(ResourceError, match="running unet: out of memory; try --residency swap") as caught:
        engine.infer(inputs)
    assert caught.value.__cause__ is error


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


def test_graphs_that_it_cannot_run_are_refused(bundle: Bundle) -> None:
    parts = bundle.manifest.components
    fp8 = {"unet": msgspec.structs.replace(parts["unet"], precision="fp8")}
    with pytest.raises(IncompatibleError, match="fp8, which OpenVINO does not compute in"):
        OvEngine(Bundle(bundle.root, msgspec.structs.replace(bundle.manifest, components=fp8)), "unet", "fp32")
    with pytest.raises(IncompatibleError, match="contains only plans"):
        OvEngine(Bundle(bundle.root, msgspec.structs.replace(bundle.manifest, onnx=False)), "unet", "fp32")


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


def test_nothing_is_read_before_prefetch(bundle: Bundle) -> None:
    (bundle.root / "model.onnx").unlink()
    with pytest.raises(SdxlTrtError, match=r"model\.onnx"):
        OvEngine(bundle, "unet", "fp32").prefetch()
