"""ONNX Runtime's own in its engine: sessions, what is copied to a device, providers."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from small_models.engines import OnDevice
from small_models.graphs import tiny_bundle, tiny_graph

from sdxl_trt.engines.backends.ort.engine import OrtEngine
from sdxl_trt.engines.backends.ort.providers import ExecutionProvider
from sdxl_trt.engines.bundle.bundle import Bundle
from sdxl_trt.engines.bundle.profile import Profile
from sdxl_trt.engines.errors import (
    IncompatibleError,
    SizeError,
    UsageError,
)

Make = Callable[[Path], Bundle]


@pytest.fixture(params=[OrtEngine, OnDevice])
def engine(request: pytest.FixtureRequest, bundle: Bundle) -> OrtEngine:
    return request.param(bundle, "unet")


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


def test_a_session_on_a_cpu_plans_no_shared_outputs_and_stops_spinning(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan takes more than half of a session's time, and saves nothing there; spinning slows the next session."""
    planned: list[tuple[bool, str]] = []
    original = ExecutionProvider.open

    def note(self: ExecutionProvider, ort: object, graph: bytes, options: Any, *rest: Any) -> object:
        planned.append((options.enable_mem_reuse, options.get_session_config_entry("session.force_spinning_stop")))
        return original(self, ort, graph, options, *rest)

    monkeypatch.setattr(ExecutionProvider, "open", note)
    OrtEngine(bundle, "unet").load()
    assert planned == [(False, "1")]


def test_a_missing_backend_names_the_extra(engine, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(IncompatibleError, match=r"pip install 'sdxl-trt\[cpu\]'"):
        engine.load()


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
