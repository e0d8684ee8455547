"""The Engine protocol on every library that maps the weights, with a graph small enough to compute by hand."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from small_models.engines import OnDevice
from small_models.graphs import tiny_bundle, tiny_graph

from sdxl_trt.engines.backends.mapped.engine import MappedEngine
from sdxl_trt.engines.backends.ort.engine import OrtEngine
from sdxl_trt.engines.backends.ov.engine import OvEngine
from sdxl_trt.engines.bundle.bundle import Bundle
from sdxl_trt.engines.engine import DeviceArray
from sdxl_trt.engines.errors import (
    CorruptError,
    EngineError,
    IncompatibleError,
    ResourceError,
    SdxlTrtError,
    UsageError,
)

Inputs = dict[str, np.ndarray]
Make = Callable[[Bundle], OrtEngine | OvEngine]
MAKERS: dict[str, Make] = {
    "ort": lambda bundle: OrtEngine(bundle, "unet"),
    "ort-device": lambda bundle: OnDevice(bundle, "unet"),
    "openvino": lambda bundle: OvEngine(bundle, "unet", "fp32"),
}


@pytest.fixture(params=MAKERS.values(), ids=MAKERS)
def make(request: pytest.FixtureRequest) -> Make:
    return request.param


@pytest.fixture
def engine(make: Make, bundle: Bundle) -> OrtEngine | OvEngine:
    return make(bundle)


@pytest.fixture
def loaded(engine: OrtEngine | OvEngine, embeds: Inputs) -> OrtEngine | OvEngine:
    engine.load()
    engine.bind(embeds)
    return engine


def _rows(inputs: Inputs, rows: int) -> Inputs:
    return {name: array[:rows] for name, array in inputs.items()}


def test_it_computes_the_graph(loaded, inputs, embeds, weights) -> None:
    result = loaded.infer(inputs)
    expected = inputs["sample"] @ weights + embeds["text_embeds"][:2]
    np.testing.assert_allclose(result["out_sample"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(result["scaled"], [2, 4])


def test_every_number_of_rows_computes_with_its_own_rows(loaded, rng, embeds, weights) -> None:
    """More shapes than OpenVINO keeps, and back: each call computes its own, with the constants cut to its rows."""
    for rows in (1, 4, 2, 3, 1, 4, 4, 2):
        sample = rng.standard_normal((rows, 3)).astype(np.float32)
        result = loaded.infer({"sample": sample, "timestep": np.zeros(rows, np.float32)})["out_sample"]
        np.testing.assert_allclose(result, sample @ weights + embeds["text_embeds"][:rows], rtol=1e-5, atol=1e-5)


def test_only_requested_outputs_are_returned(loaded, inputs) -> None:
    assert list(loaded.infer(inputs, ["scaled"])) == ["scaled"]
    with pytest.raises(EngineError):
        loaded.infer(inputs, ["no_such_output"])


def test_an_output_for_another_engine_only_is_not_copied_unasked(loaded, inputs) -> None:
    outputs = tuple(msgspec.structs.replace(spec, name=spec.name.replace("scaled", "deep_feature"))
                    for spec in loaded.component.outputs)  # fmt: skip
    loaded.component = msgspec.structs.replace(loaded.component, outputs=outputs)
    assert list(loaded.infer(inputs)) == ["out_sample"]


def test_the_caller_owns_the_results(loaded, inputs) -> None:
    first = loaded.infer(inputs)["out_sample"]
    kept = first.copy()
    first[:] = 0
    np.testing.assert_array_equal(loaded.infer(inputs)["out_sample"], kept)


def test_outputs_that_are_kept_are_inputs_of_a_later_call(loaded, inputs) -> None:
    on_host = loaded.infer(inputs)
    out, kept = loaded.infer_keeping(inputs, {"out_sample"}, ["scaled"])
    again, other = loaded.infer_keeping({**inputs, "sample": -inputs["sample"]}, {"out_sample"}, ["scaled"])
    assert (list(out), list(kept)) == (["scaled"], ["out_sample"])
    np.testing.assert_array_equal(out["scaled"], again["scaled"])
    loaded.bind({})
    fed, expected, differs = (loaded.infer({**inputs, "text_embeds": each["out_sample"]})["out_sample"]
                              for each in (kept, on_host, other))  # fmt: skip
    np.testing.assert_array_equal(fed, expected)
    assert not np.array_equal(fed, differs)


def test_an_array_of_another_backend_is_refused(engine, inputs) -> None:
    engine.load()
    foreign = DeviceArray((2, 5), np.dtype(np.float32), object(), "elsewhere")
    runs_on = "openvino" if isinstance(engine, OvEngine) else "ort-cpu"
    with pytest.raises(UsageError, match=f"text_embeds is on elsewhere, but this engine runs on {runs_on}"):
        engine.infer({**inputs, "text_embeds": foreign})


def test_the_error_of_infer_before_load_names_the_call(engine, inputs) -> None:
    with pytest.raises(EngineError, match=r"unet: infer before load; call load\(\) first"):
        engine.infer(inputs)


def test_a_missing_constant_is_named(engine, inputs) -> None:
    engine.load()
    with pytest.raises(UsageError, match=r"\['sample', 'timestep'\] given, but the graph takes.*text_embeds"):
        engine.infer(inputs)


@pytest.mark.parametrize("wrong", [np.zeros((2, 3)), np.zeros((2, 4), np.float32), np.zeros((), np.float32)])
def test_an_input_that_does_not_fit_is_a_usage_error(loaded, inputs, wrong: np.ndarray) -> None:
    with pytest.raises(UsageError, match=r"given, .*expected"):
        loaded.infer(inputs | {"sample": wrong})


def test_no_inputs_are_a_usage_error(loaded) -> None:
    with pytest.raises(UsageError):
        loaded.infer({})


def test_an_input_overrides_a_constant_of_its_name(loaded, inputs, embeds) -> None:
    given = {"text_embeds": np.zeros((2, 5), np.float32)}
    changed = loaded.infer(inputs | given)["out_sample"]
    np.testing.assert_allclose(changed + embeds["text_embeds"][:2], loaded.infer(inputs)["out_sample"], atol=1e-6)


def test_arrays_of_any_memory_layout_are_accepted(loaded, inputs, embeds) -> None:
    expected = loaded.infer(inputs)["out_sample"]
    loaded.bind({"text_embeds": np.asfortranarray(embeds["text_embeds"])})
    turned = inputs | {"sample": np.asfortranarray(inputs["sample"])}
    np.testing.assert_array_equal(loaded.infer(turned)["out_sample"], expected)


def test_nothing_is_read_before_prefetch(make: Make, bundle: Bundle) -> None:
    (bundle.root / "model.onnx").unlink()
    engine = make(bundle)
    with pytest.raises(SdxlTrtError, match=r"model\.onnx"):
        engine.prefetch()


@pytest.mark.parametrize("name", ["model.onnx", "weights.data"])
@pytest.mark.parametrize("call", ["prefetch", "load"])
def test_a_changed_byte_is_found_before_the_backend_sees_it(engine, bundle, name, call, monkeypatch) -> None:
    monkeypatch.setattr(MappedEngine, "_put_loras", lambda _: pytest.fail("the damaged file was used"))
    content = bytearray((bundle.root / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle.root / name).write_bytes(bytes(content))
    with pytest.raises(CorruptError, match=f"{name}.*sha256"):
        getattr(engine, call)()


def test_an_engine_can_be_loaded_again_after_unload(loaded, inputs, embeds) -> None:
    loaded.load()
    before = loaded.infer(inputs)["out_sample"]
    loaded.unload()
    loaded.unload()
    with pytest.raises(EngineError, match="infer before load"):
        loaded.infer(inputs)
    loaded.prefetch()
    loaded.prefetch()
    loaded.load()
    with pytest.raises(UsageError, match="text_embeds"):
        loaded.infer(inputs)  # the bound inputs were freed too
    loaded.bind(embeds)
    np.testing.assert_array_equal(loaded.infer(inputs)["out_sample"], before)


@pytest.mark.parametrize("call", ["prefetch", "load"])
def test_unload_frees_the_map(engine, call: str) -> None:
    engine.prefetch()
    mapped = engine._weights
    getattr(engine, call)()
    engine.unload()
    assert mapped.closed
    assert engine._graph is None


def test_a_graph_that_is_rejected_is_explained(make: Make, tmp_path: Path, weights: np.ndarray) -> None:
    unknown = tiny_graph(weights).replace(b"MatMul", b"MatFul")
    engine = make(tiny_bundle(tmp_path, weights, unknown))
    for _ in range(2):  # a load that failed has not loaded
        with pytest.raises(EngineError, match=rf"loading unet: {engine.library} failed: .*MatFul") as caught:
            engine.load()
        assert "\n" not in str(caught.value)
        assert caught.value.__cause__ is not None


def test_a_graph_cannot_refer_to_another_file(make: Make, tmp_path: Path, weights: np.ndarray) -> None:
    (tmp_path / "secrets.data").write_bytes(weights.tobytes())
    graph = tiny_graph(weights).replace(b"weights.data", b"secrets.data")
    with pytest.raises(SdxlTrtError):
        make(tiny_bundle(tmp_path, weights, graph)).load()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("std::bad_alloc"), RuntimeError("Failed to allocate 9")])
def test_out_of_memory_is_a_resource_error(loaded, inputs, error: Exception, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise error

    ours = isinstance(loaded, OvEngine)
    monkeypatch.setattr(*((loaded, "_request") if ours else (loaded._device or loaded._session, "run")), fail)
    with pytest.raises(ResourceError, match="running unet: out of memory; try --residency swap") as caught:
        loaded.infer(inputs)
    assert caught.value.__cause__ is error


def test_a_bundle_of_plans_only_is_refused(make: Make, bundle: Bundle) -> None:
    planned = Bundle(bundle.root, msgspec.structs.replace(bundle.manifest, onnx=False))
    with pytest.raises(IncompatibleError, match="contains only plans"):
        make(planned)
