"""The graph for ONNX Runtime's CPU provider gives the outputs of the graph for all backends, with fewer passes."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from sdxl_trt.engines.backends.ort.engine import OrtEngine
from sdxl_trt.engines.bundle.bundle import Bundle, read_bundle
from sdxl_trt.engines.engine import numpy_dtype
from sdxl_trt.export.graph.cpu_graph import for_cpu

Arrays = dict[str, np.ndarray]
WIDTH, HEADS = 8, 2
SIZES = {"rows": 3, "height": 16, "width": 24, "tokens": 77}


def _run(model: ir.Model, feed: Arrays) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    content = ir.to_proto(model).SerializeToString()
    result: np.ndarray = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"]).run(None, feed)[0]
    return result


def _model(nodes: list[onnx.NodeProto], inputs: dict[str, list[int | str]], weights: Arrays) -> ir.Model:
    """Return a model of opset 23 with the output `out`."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "g", values, [output], initializer=initializers)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    return ir.from_proto(proto)


def _attention(
    *, heads: tuple[int, int, int] = (HEADS, HEADS, HEADS), perm: tuple[int, ...] = (0, 2, 1, 3), **attributes: Any
) -> ir.Model:
    nodes, weights = [], {"joined": np.array([0, -1, WIDTH])}
    for number, name in enumerate("qkv"):
        weights[f"apart{number}"] = np.array([0, 0, heads[number], -1])
        nodes += [helper.make_node("Reshape", [name, f"apart{number}"], [f"{name}1"]),
                  helper.make_node("Transpose", [f"{name}1"], [f"{name}2"], perm=(0, 2, 1, 3))]  # fmt: skip
    nodes += [
        helper.make_node("Attention", ["q2", "k2", "v2"], ["a"], **attributes),
        helper.make_node("Transpose", ["a"], ["t"], perm=perm),
        helper.make_node("Reshape", ["t", "joined"], ["out"]),
    ]
    return _model(nodes, {name: ["rows", f"{name}n", WIDTH] for name in "qkv"}, weights)


def _operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("attributes", [{}, {"scale": 0.3}], ids=["usual scale", "its own scale"])
def test_attention_becomes_multi_head_attention(rng: np.random.Generator, attributes: dict[str, float]) -> None:
    model = _attention(**attributes)
    feed = {
        name: rng.standard_normal((3, length, WIDTH), dtype=np.float32)
        for name, length in zip("qkv", (5, 7, 7), strict=True)
    }
    before = _run(model, feed)
    assert for_cpu(model) == 1
    assert _operators(model) == {"MultiHeadAttention": 1}
    np.testing.assert_allclose(_run(model, feed), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: _attention(is_causal=1), id="causal"),
        pytest.param(lambda: _attention(softcap=2.0), id="softcap"),
        pytest.param(lambda: _attention(perm=(0, 1, 2, 3)), id="heads not merged"),
        pytest.param(lambda: _attention(heads=(4, HEADS, HEADS)), id="heads differ"),
    ],
)
def test_other_attention_patterns_stay(model: Callable[[], ir.Model]) -> None:
    left = model()
    before = _operators(left)
    assert for_cpu(left) == 0
    assert _operators(left) == before
    assert "com.microsoft" not in left.opset_imports


@pytest.mark.parametrize("shape", [(3, 12, 5, 7), (2, 12, 9)], ids=["picture", "pixels in a row"])
@pytest.mark.parametrize("groups", [1, 4, 12])
def test_groups_are_normalized_in_one_pass(rng: np.random.Generator, shape: tuple[int, ...], groups: int) -> None:
    node = helper.make_node("GroupNormalization", ["x", "w", "b"], ["out"], num_groups=groups, epsilon=1e-2)
    weights = {name: rng.standard_normal(12, dtype=np.float32) for name in "wb"}
    model = _model([node], {"x": [f"d{n}" for n in range(len(shape))]}, weights)
    feed = {"x": rng.standard_normal(shape, dtype=np.float32) * 3 + 1}
    before = _run(model, feed)
    assert for_cpu(model) == 1
    assert _operators(model)["InstanceNormalization"] == 1
    np.testing.assert_allclose(_run(model, feed), before, rtol=1e-5, atol=2e-6)


def _gated(*, bias: np.ndarray, halves: int = 2) -> ir.Model:
    names = [f"h{n}" for n in range(halves)]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Add", ["m", "b"], ["a"]),
        helper.make_node("Split", ["a"], names, axis=2, num_outputs=halves),
        helper.make_node("Sum", names, ["s"]),
        helper.make_node("Mul", ["s", names[0]], ["out"]),
    ]
    weights = {"w": np.arange(WIDTH * 12, dtype=np.float32).reshape(WIDTH, 12) / 9, "b": bias}
    return _model(nodes, {"x": ["rows", "pixels", WIDTH]}, weights)


def test_a_gated_layer_becomes_two_layers(rng: np.random.Generator) -> None:
    model = _gated(bias=np.arange(12, dtype=np.float32))
    feed = {"x": rng.standard_normal((2, 5, WIDTH), dtype=np.float32)}
    before = _run(model, feed)
    assert for_cpu(model) == 1
    assert _operators(model)["MatMul"] == 2
    np.testing.assert_allclose(_run(model, feed), before, rtol=1e-5)


def test_other_splits_stay() -> None:
    assert for_cpu(_gated(bias=np.ones((1, 12), np.float32))) == 0
    assert for_cpu(_gated(bias=np.ones(12, np.float32), halves=3)) == 0


@pytest.mark.parametrize("name", ["unet", "refiner_unet", "vae_decoder", "vae_encoder"])
def test_both_graphs_of_a_bundle_give_the_same_outputs(
    pairs: Callable[[str], Any], rng: np.random.Generator, name: str
) -> None:
    bundle = read_bundle(pairs("outline").bundle)
    component = bundle.manifest.components[name]
    assert component.cpu_graph is not None
    feed = {
        spec.name: rng.standard_normal([SIZES.get(size, 1) if isinstance(size, str) else size for size in spec.shape])
        .astype(numpy_dtype(spec))
        for spec in component.inputs
    }  # fmt: skip
    found, expected = (_outputs(bundle, name, feed, standard=standard) for standard in (False, True))
    scale = np.abs(expected).max()
    tolerance = 2e-3 if component.precision == "fp16" else 1e-5
    assert np.abs(found - expected).max() <= tolerance * scale


def _outputs(bundle: Bundle, name: str, feed: Arrays, *, standard: bool) -> np.ndarray:
    engine = OrtEngine(bundle, name, standard=standard)
    engine.load()
    try:
        (result,) = engine.infer(feed).values()
    finally:
        engine.unload()
    return result.astype(np.float32)


def test_only_the_cpu_graph_has_contrib_operators(pairs: Callable[[str], Any]) -> None:
    bundle = read_bundle(pairs("outline").bundle)
    unet = bundle.manifest.components["unet"]
    assert unet.cpu_graph is not None
    found = {
        file: {node.domain for node in onnx.load(bundle.path(record), load_external_data=False).graph.node}
        for file, record in (("all", unet.graph), ("cpu", unet.cpu_graph))
    }
    assert found == {"all": {""}, "cpu": {"", "com.microsoft"}}
    assert bundle.manifest.components["text_encoder"].cpu_graph is None
