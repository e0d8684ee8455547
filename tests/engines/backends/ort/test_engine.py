"""The Engine protocol on ONNX Runtime, with a graph small enough to compute by hand."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from small_models.graphs import tiny_bundle, tiny_graph

from sdxl_trt.engines.backends.ort import engine as ort_module
from sdxl_trt.engines.backends.ort.engine import DeviceTensors, OrtEngine
from sdxl_trt.engines.backends.ort.providers import ExecutionProvider
from sdxl_trt.engines.bundle.bundle import Bundle
from sdxl_trt.engines.bundle.profile import Profile
from sdxl_trt.engines.errors import (
    CorruptError,
    EngineError,
    IncompatibleError,
    ResourceError,
    SdxlTrtError,
    SizeError,
    UsageError,
)

Make = Callable[[Path], Bundle]


@pytest.fixture
def weights(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((3, 5)).astype(np.float32)


@pytest.fixture
def bundle(tmp_path: Path, weights: np.ndarray) -> Bundle:
    return tiny_bundle(tmp_path, weights, tiny_graph(weights))


class OnDevice(OrtEngine):
    """The code path of a GPU with the CPU as the device: ONNX Runtime's own memory, bindings and copies."""

    def load(self) -> None:
        super().load()
        import onnxruntime

        self._device = self._device or DeviceTensors(onnxruntime, self._session, "cpu")


@pytest.fixture(params=[OrtEngine, OnDevice])
def engine(request: pytest.FixtureRequest, bundle: Bundle) -> OrtEngine:
    return request.param(bundle, "unet")


@pytest.fixture
def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"sample": rng.standard_normal((2, 3)).astype(np.float32), "timestep": np.array([1, 2], np.float32)}


@pytest.fixture
def embeds(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return constants with more rows than a call has."""
    return {"text_embeds": rng.standard_normal((4, 5)).astype(np.float32)}


def test_it_computes_the_graph(engine, inputs, embeds, weights) -> None:
    engine.load()
    engine.bind(embeds)
    result = engine.infer(inputs)
    np.testing.assert_allclose(
        result["out_sample"], inputs["sample"] @ weights + embeds["text_embeds"][:2], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(result["scaled"], [2, 4])


def test_constants_are_sliced_to_the_rows_of_a_call(engine, inputs, embeds) -> None:
    engine.load()
    engine.bind(embeds)
    both = engine.infer(inputs)["out_sample"]
    one = engine.infer({name: array[:1] for name, array in inputs.items()})["out_sample"]
    np.testing.assert_allclose(one, both[:1], rtol=1e-6)


def test_only_requested_outputs_are_returned(engine, inputs, embeds) -> None:
    engine.load()
    engine.bind(embeds)
    assert list(engine.infer(inputs, ["scaled"])) == ["scaled"]
    with pytest.raises(EngineError):
        engine.infer(inputs, ["no_such_output"])


def test_the_caller_owns_the_results(engine, inputs, embeds) -> None:
    engine.load()
    engine.bind(embeds)
    first = engine.infer(inputs)["out_sample"]
    kept = first.copy()
    first[:] = 0
    np.testing.assert_array_equal(engine.infer(inputs)["out_sample"], kept)


def test_large_weights_outlive_their_file(tmp_path: Path, rng: np.random.Generator) -> None:
    """More than a megabyte, which engines map; the file may change once the session is created."""
    weights = rng.standard_normal((512, 1024)).astype(np.float32)
    engine = OrtEngine(tiny_bundle(tmp_path, weights, tiny_graph(weights)), "unet")
    engine.load()
    (tmp_path / "weights.data").write_bytes(bytes(weights.nbytes))
    sample = rng.standard_normal((1, 512)).astype(np.float32)
    engine.bind({"text_embeds": np.zeros((1, 1024), np.float32)})
    result = engine.infer({"sample": sample, "timestep": np.zeros(1, np.float32)})["out_sample"]
    np.testing.assert_allclose(result, sample @ weights, rtol=1e-3, atol=1e-3)


def test_a_session_on_a_cpu_makes_no_plan_of_shared_outputs(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Making it takes more than half of a session's time, and saves nothing there."""
    planned: list[bool] = []
    original = ExecutionProvider.open

    def note(self: ExecutionProvider, ort: object, graph: bytes, options: Any, *rest: Any) -> object:
        planned.append(options.enable_mem_reuse)
        return original(self, ort, graph, options, *rest)

    monkeypatch.setattr(ExecutionProvider, "open", note)
    OrtEngine(bundle, "unet").load()
    assert planned == [False]


def test_the_error_of_infer_before_load_names_the_call(engine, inputs) -> None:
    with pytest.raises(EngineError, match=r"unet: infer before load; call load\(\) first"):
        engine.infer(inputs)


def test_a_missing_constant_is_named(engine, inputs) -> None:
    engine.load()
    with pytest.raises(UsageError, match=r"\['sample', 'timestep'\] given, but the graph takes.*text_embeds"):
        engine.infer(inputs)


@pytest.mark.parametrize("wrong", [np.zeros((2, 3)), np.zeros((2, 4), np.float32), np.zeros((), np.float32)])
def test_an_input_that_does_not_fit_is_a_usage_error(engine, inputs, embeds, wrong: np.ndarray) -> None:
    engine.load()
    engine.bind(embeds)
    with pytest.raises(UsageError):
        engine.infer(inputs | {"sample": wrong})


def test_no_inputs_are_a_usage_error(engine, embeds) -> None:
    engine.load()
    engine.bind(embeds)
    with pytest.raises(UsageError):
        engine.infer({})


def test_nothing_is_read_before_prefetch(bundle: Bundle) -> None:
    (bundle.root / "model.onnx").unlink()
    engine = OrtEngine(bundle, "unet")
    with pytest.raises(SdxlTrtError, match=r"model\.onnx"):
        engine.prefetch()


@pytest.mark.parametrize("name", ["model.onnx", "weights.data"])
@pytest.mark.parametrize("call", ["prefetch", "load"])
def test_a_changed_byte_is_found_before_the_backend_sees_it(engine, bundle, name, call, monkeypatch) -> None:
    monkeypatch.setattr(ort_module, "_onnxruntime", lambda _provider: pytest.fail("ONNX Runtime got the damaged file"))
    content = bytearray((bundle.root / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle.root / name).write_bytes(bytes(content))
    with pytest.raises(CorruptError, match=f"{name}.*sha256"):
        getattr(engine, call)()


def test_an_engine_can_be_loaded_again_after_unload(engine, inputs, embeds) -> None:
    engine.load()
    engine.load()
    engine.bind(embeds)
    before = engine.infer(inputs)["out_sample"]
    engine.unload()
    engine.unload()
    with pytest.raises(EngineError, match="infer before load"):
        engine.infer(inputs)
    engine.prefetch()
    engine.prefetch()
    engine.load()
    with pytest.raises(UsageError, match="text_embeds"):
        engine.infer(inputs)  # the bound inputs were freed too
    engine.bind(embeds)
    np.testing.assert_array_equal(engine.infer(inputs)["out_sample"], before)


def test_unload_frees_a_prefetch(engine) -> None:
    engine.prefetch()
    mapped = engine._weights
    engine.unload()
    assert mapped.closed
    assert engine._graph is None


def test_a_graph_that_onnx_runtime_rejects_is_explained(tmp_path: Path, weights: np.ndarray) -> None:
    engine = OrtEngine(tiny_bundle(tmp_path, weights, b"not a graph"), "unet")
    with pytest.raises(EngineError, match="loading unet: ONNX Runtime failed") as caught:
        engine.load()
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None


def test_a_graph_cannot_refer_to_another_file(tmp_path: Path, weights: np.ndarray) -> None:
    (tmp_path / "secrets.data").write_bytes(weights.tobytes())
    graph = tiny_graph(weights).replace(b"weights.data", b"secrets.data")
    with pytest.raises(EngineError):
        OrtEngine(tiny_bundle(tmp_path, weights, graph), "unet").load()


def test_a_missing_backend_names_the_extra(engine, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(IncompatibleError, match=r"pip install 'sdxl-trt\[cpu\]'"):
        engine.load()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("std::bad_alloc"), RuntimeError("Failed to allocate 9")])
def test_out_of_memory_is_a_resource_error(engine, inputs, embeds, error: Exception, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise error

    engine.load()
    engine.bind(embeds)
    runner = engine._device or engine._session
    monkeypatch.setattr(runner, "run", fail)
    with pytest.raises(ResourceError, match="running unet: out of memory; try --residency swap") as caught:
        engine.infer(inputs)
    assert caught.value.__cause__ is error


class Uploads:
    """Records the arrays that ONNX Runtime's OrtValue copies to the device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import onnxruntime

        self.sizes: list[tuple[int, ...]] = []
        real = onnxruntime.OrtValue.ortvalue_from_numpy

        def recorded(array: np.ndarray, *device: object) -> object:
            self.sizes.append(array.shape)
            return real(array, *device)

        monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", recorded)


def test_constants_are_copied_once_per_phase(bundle, inputs, embeds, weights, monkeypatch) -> None:
    engine, uploads = OnDevice(bundle, "unet"), Uploads(monkeypatch)
    engine.bind(embeds)
    engine.load()
    engine.infer(inputs)
    engine.infer({name: array[:1] for name, array in inputs.items()})
    assert uploads.sizes == [(4, 5)]  # all rows, whatever the rows of a call
    engine.bind({"text_embeds": embeds["text_embeds"] + 1})
    result = engine.infer(inputs)["out_sample"]
    assert uploads.sizes == [(4, 5), (4, 5)]
    np.testing.assert_allclose(
        result, inputs["sample"] @ weights + embeds["text_embeds"][:2] + 1, rtol=1e-5, atol=1e-6
    )  # fmt: skip


def test_constants_on_the_device_are_a_copy(bundle, inputs, embeds) -> None:
    engine = OnDevice(bundle, "unet")
    engine.load()
    engine.bind(embeds)
    before = engine.infer(inputs)["out_sample"]
    embeds["text_embeds"][:] = 0
    np.testing.assert_array_equal(engine.infer(inputs)["out_sample"], before)


def test_an_input_overrides_a_constant_of_its_name(engine, inputs, embeds) -> None:
    engine.load()
    engine.bind(embeds)
    given = {"text_embeds": np.zeros((2, 5), np.float32)}
    changed = engine.infer(inputs | given)["out_sample"]
    np.testing.assert_allclose(changed + embeds["text_embeds"][:2], engine.infer(inputs)["out_sample"], atol=1e-6)


def test_arrays_of_any_memory_layout_are_accepted(engine, inputs, embeds) -> None:
    engine.load()
    engine.bind(embeds)
    expected = engine.infer(inputs)["out_sample"]
    engine.bind({"text_embeds": np.asfortranarray(embeds["text_embeds"])})
    turned = inputs | {"sample": np.asfortranarray(inputs["sample"])}
    np.testing.assert_array_equal(engine.infer(turned)["out_sample"], expected)


def test_the_error_of_a_compiled_graph_names_its_shapes(engine, inputs, embeds) -> None:
    engine.load()
    engine.bind(embeds)
    one = {"sample": (1, 3), "timestep": (1,), "text_embeds": (1, 5)}
    engine._limits = Profile(shapes={name: (shape, shape, shape) for name, shape in one.items()})
    with pytest.raises(SizeError, match=r"unet: the plan takes rows 1; rows 2 given"):
        engine.infer(inputs)
    engine.infer({name: array[:1] for name, array in inputs.items()})


def test_the_error_for_a_stale_cached_engine_names_the_folder(engine, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("TensorRT EP could not deserialize engine from cache: /x/TensorrtExecutionProvider_1.engine")

    monkeypatch.setattr(ExecutionProvider, "open", fail)
    with pytest.raises(IncompatibleError, match=r"remove sdxl-trt/onnxruntime"):
        engine.load()


@pytest.mark.parametrize(("provider", "extra"), [("ort-cpu", "cpu"), ("ort-cuda", "gpu"), ("ort-tensorrt", "gpu")])
def test_each_provider_names_its_package(bundle, provider, extra, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(IncompatibleError, match=rf"provider {provider} .*pip install 'sdxl-trt\[{extra}\]'"):
        OrtEngine(bundle, "unet", provider).load()


def test_the_error_for_an_unknown_provider_lists_the_known(bundle) -> None:
    with pytest.raises(UsageError, match="ort-cpu, ort-cuda, ort-tensorrt"):
        OrtEngine(bundle, "unet", "ort-metal")


@pytest.mark.parametrize("provider", ["ort-cpu", "ort-cuda"])
def test_bf16_is_refused_without_kernels_for_it(bundle, provider) -> None:
    component = msgspec.structs.replace(bundle.manifest.components["unet"], precision="bf16")
    wide = Bundle(bundle.root, msgspec.structs.replace(bundle.manifest, components={"unet": component}))
    with pytest.raises(IncompatibleError, match="bf16"):
        OrtEngine(wide, "unet", provider)
    OrtEngine(wide, "unet", "ort-tensorrt")


def test_a_bundle_of_plans_only_is_refused(tmp_path: Path) -> None:
    import msgspec

    from sdxl_trt.engines.bundle.bundle import Bundle, read_bundle
    from sdxl_trt.mini.embedded import bundle_path

    manifest = msgspec.structs.replace(read_bundle(bundle_path()).manifest, onnx=False)
    with pytest.raises(IncompatibleError, match="contains only plans"):
        OrtEngine(Bundle(tmp_path, manifest), "unet")
