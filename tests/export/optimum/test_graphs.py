"""The wrapped graphs: optimum-onnx's signature, and the outputs of the original graph."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from sdxl_trt.engines.bundle.bundle import Bundle, read_bundle
from sdxl_trt.engines.errors import CorruptError
from sdxl_trt.export import Options, export_bundle
from sdxl_trt.export.optimum.graphs import wrap
from sdxl_trt.mini.embedded import bundle_path

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
AXES = {"rows": 3, "pictures": 2, "prompts": 2, "vectors": 1, "tokens": 154, "height": 16, "width": 24}


def _session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _wrapped(bundle: Bundle, name: str) -> tuple[Any, Any]:
    """Return sessions of a component and of its wrapped graph, which is written beside it."""
    graph = bundle.path(bundle.manifest.components[name].graph)
    model = ir.load(graph)
    wrap(model)
    target = graph.with_name("wrapped.onnx")
    ir.save(model, target)
    onnx.checker.check_model(target, full_check=True)
    return _session(graph), _session(target)


def _feeds(session: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    feeds = {}
    for value in session.get_inputs():
        shape = [AXES.get(dim, dim) for dim in value.shape]
        drawn = rng.integers(0, 300, shape) if value.type == "tensor(int64)" else rng.standard_normal(shape)
        feeds[value.name] = np.asarray(drawn, DTYPES[value.type])
    return feeds


def _check_unet(bundle: Bundle, name: str, rng: np.random.Generator) -> None:
    plain, wrapped = _wrapped(bundle, name)
    feeds = _feeds(plain, rng) | {"timestep": np.full(AXES["rows"], 651.25, np.float32)}
    expected = plain.run(["out_sample"], feeds)[0]
    found = wrapped.run(["out_sample"], feeds | {"timestep": np.array(651.25, np.float32)})[0]
    np.testing.assert_array_equal(found, expected)
    another = wrapped.run(["out_sample"], feeds | {"timestep": np.array(1.0, np.float32)})[0]
    assert not np.array_equal(another, expected)


@pytest.fixture
def bundle(pairs: Callable[[str], Any], tmp_path: Path) -> Bundle:
    """Return a writable copy of the outline pair's bundle."""
    return read_bundle(shutil.copytree(pairs("outline").bundle, tmp_path / "bundle"))


@pytest.mark.parametrize("name", ["unet", "refiner_unet"])
def test_one_timestep_is_broadcast_to_all_rows(bundle: Bundle, name: str, rng: np.random.Generator) -> None:
    _check_unet(bundle, name, rng)


def _check_all(bundle: Bundle, rng: np.random.Generator) -> None:
    _check_unet(bundle, "unet", rng)
    for name in ("text_encoder", "text_encoder_2", "vae_decoder", "vae_encoder"):
        plain, wrapped = _wrapped(bundle, name)
        feeds = _feeds(plain, rng)
        if "embedding_index" in feeds:
            feeds["embedding_index"][:] = 0
            assert [value.name for value in wrapped.get_inputs()] == ["input_ids"]
        for output in plain.get_outputs():
            kept = {value.name: feeds[value.name] for value in wrapped.get_inputs()}
            np.testing.assert_array_equal(wrapped.run([output.name], kept)[0], plain.run([output.name], feeds)[0])


def test_the_embedded_bundle_in_fp16(tmp_path: Path, rng: np.random.Generator) -> None:
    _check_all(read_bundle(shutil.copytree(bundle_path(), tmp_path / "bundle")), rng)


@pytest.mark.slow
@pytest.mark.usefixtures("converted_once")
def test_the_older_opset_with_an_fp16_autoencoder(
    pairs: Callable[[str], Any], tmp_path: Path, rng: np.random.Generator
) -> None:
    options = Options(precision="fp32", vae_precision="fp16", opset=20)  # as in test_precision
    _check_all(export_bundle(pairs("outline").base, None, tmp_path / "bundle", options), rng)


def test_the_signature_equals_that_of_optimums_exports(bundle: Bundle) -> None:
    _, unet = _wrapped(bundle, "unet")
    shapes = {value.name: len(value.shape) for value in unet.get_inputs()}
    # Copied from a folder that optimum-onnx 0.1.0 exported.
    assert shapes == {"sample": 4, "timestep": 0, "encoder_hidden_states": 3, "text_embeds": 2, "time_ids": 2}
    _, encoder = _wrapped(bundle, "text_encoder_2")
    names = [value.name for value in encoder.get_outputs()]
    assert names == ["text_embeds", *(f"hidden_states.{i}" for i in range(4))]


@pytest.mark.parametrize("name", ["vae_decoder", "vae_encoder"])
def test_output_sizes_are_expressions_for_optimum(bundle: Bundle, name: str, rng: np.random.Generator) -> None:
    _, wrapped = _wrapped(bundle, name)
    result = wrapped.run(None, _feeds(wrapped, rng))[0]
    # As in its _dynamic_axis_inference: split at spaces, replace names by sizes, evaluate.
    terms = [str(dim).split(" ") for dim in wrapped.get_outputs()[0].shape]
    assert [int(eval(" ".join(str(AXES.get(word, word)) for word in words))) for words in terms] == list(result.shape)


def test_weights_are_unchanged(bundle: Bundle) -> None:
    def places(path: Path) -> dict[str, list[tuple[str, str]]]:
        graph = onnx.load(path, load_external_data=False).graph
        stored = (tensor for tensor in graph.initializer if tensor.external_data)
        return {tensor.name: [(entry.key, entry.value) for entry in tensor.external_data] for tensor in stored}

    graph = bundle.path(bundle.manifest.components["unet"].graph)
    _wrapped(bundle, "unet")
    assert len(places(graph)) > 100
    assert places(graph.with_name("wrapped.onnx")) == places(graph)


def test_a_graph_is_wrapped_once(bundle: Bundle) -> None:
    model = ir.load(bundle.path(bundle.manifest.components["unet"].graph))
    wrap(model)
    with pytest.raises(CorruptError, match=r"not of shape \(rows,\); run export-engines again"):
        wrap(model)
