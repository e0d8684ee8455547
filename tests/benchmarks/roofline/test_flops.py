"""Counts of graphs equal torch's own counter on the modules they were exported from."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional as fn
from torch.utils.flop_counter import FlopCounterMode

from sdxl_trt.benchmarks.roofline.flops import Counts, component_shapes, count_component, count_graph, count_model
from sdxl_trt.engines.bundle.bundle import Bundle, read_bundle
from sdxl_trt.engines.errors import CorruptError, IncompatibleError, SizeError, UsageError
from sdxl_trt.export.graph.models import build_model
from sdxl_trt.export.graph.signatures import make_graph
from sdxl_trt.mini.embedded import bundle_path

SIZE = {"rows": 2, "height": 64, "width": 96, "tokens": 154}


def torch_flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def one_node(op: str, inputs: dict[str, tuple[int, ...]], weights: dict[str, tuple[int, ...]] = {}, **attributes: Any) -> onnx.ModelProto:  # noqa: B006, E501 # fmt: skip
    node = helper.make_node(op, [*inputs, *weights], ["y"], **attributes)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape) for name, shape in inputs.items()]
    held = [numpy_helper.from_array(np.zeros(shape, np.float16), name) for name, shape in weights.items()]
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)
    graph = helper.make_graph([node], "g", ends, [result], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return (query @ key.transpose(-1, -2)).softmax(-1) @ value


CASES: dict[str, tuple[onnx.ModelProto, dict[str, tuple[int, ...]], Callable[[], object]]] = {
    "grouped, strided convolution": (
        one_node("Conv", {"x": (2, 8, 17, 12)}, {"w": (6, 4, 3, 5)}, group=2, strides=[2, 1], pads=[1, 2, 1, 0]),
        {"x": (2, 8, 17, 12)},
        lambda: fn.conv2d(fn.pad(meta(2, 8, 17, 12), (2, 0, 1, 1)), meta(6, 4, 3, 5), stride=(2, 1), groups=2),
    ),
    "transposed convolution": (
        one_node("ConvTranspose", {"x": (2, 8, 5, 6)}, {"w": (8, 3, 4, 4)}, strides=[2, 2]),
        {"x": (2, 8, 5, 6)},
        lambda: fn.conv_transpose2d(meta(2, 8, 5, 6), meta(8, 3, 4, 4), stride=2),
    ),
    "matrices in a batch, one broadcast": (
        one_node("MatMul", {"x": (3, 5, 7), "z": (7, 11)}),
        {"x": (3, 5, 7), "z": (7, 11)},
        lambda: meta(3, 5, 7) @ meta(7, 11),
    ),
    "Gemm, both transposed": (
        one_node("Gemm", {"x": (5, 3)}, {"w": (9, 5), "b": (9,)}, transA=1, transB=1),
        {"x": (5, 3)},
        lambda: torch.addmm(meta(9), meta(3, 5), meta(5, 9)),
    ),
    "attention by heads": (
        one_node("Attention", {"q": (2, 4, 10, 8), "k": (2, 4, 7, 8), "v": (2, 4, 7, 6)}),
        {"q": (2, 4, 10, 8), "k": (2, 4, 7, 8), "v": (2, 4, 7, 6)},
        lambda: attend(meta(2, 4, 10, 8), meta(2, 4, 7, 8), meta(2, 4, 7, 6)),
    ),
    "attention packed, values shared by heads": (
        one_node("Attention", {"q": (2, 10, 32), "k": (2, 7, 16), "v": (2, 7, 12)}, q_num_heads=4, kv_num_heads=2),
        {"q": (2, 10, 32), "k": (2, 7, 16), "v": (2, 7, 12)},
        lambda: attend(meta(2, 4, 10, 8), meta(2, 4, 7, 8), meta(2, 4, 7, 6)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_operator_costs_what_torch_counts(case: str) -> None:
    model, shapes, reference = CASES[case]
    assert count_model(model, shapes).flops == torch_flops(reference)


@pytest.fixture(scope="module")
def bundle(pairs: Any) -> Bundle:
    return read_bundle(pairs("outline").bundle)


def module_flops(bundle: Bundle, name: str, shapes: dict[str, tuple[int, ...]]) -> int:
    """Return torch's count of the PyTorch module that a component was exported from, run on the meta device."""
    component = bundle.manifest.components[name]
    model = build_model(component.source.class_name, component.config, name)
    specs = {spec.name: spec.shape for spec in component.inputs}
    widths = {side: int(specs[side][1]) for side in ("time_ids", "text_embeds") if side in specs}
    graph = make_graph(
        component.kind, model, time_ids=widths.get("time_ids", 0), pooled=widths.get("text_embeds", 0), where=name
    )
    ids = component.kind == "text_encoder"
    inputs = [torch.empty(shape, device="meta", dtype=torch.int64 if ids else None) for shape in shapes.values()]
    return torch_flops(lambda: graph.module(*inputs))


@pytest.mark.parametrize(
    "name", ["text_encoder", "text_encoder_2", "unet", "refiner_unet", "vae_decoder", "vae_encoder"]
)
def test_every_graph_costs_what_torch_counts_for_its_module(bundle: Bundle, name: str) -> None:
    factor = bundle.manifest.base.vae.factor
    for size in (SIZE, SIZE | {"rows": 3, "height": 128, "width": 32, "tokens": 77}):
        shapes = component_shapes(bundle.manifest.components[name], factor, **size)
        counts = count_component(bundle, name, **size)
        assert counts.flops == sum(counts.by_operator.values()) == module_flops(bundle, name, shapes)


def test_the_weights_are_not_needed(bundle: Bundle, tmp_path: Path) -> None:
    component = bundle.manifest.components["unet"]
    shutil.copy(bundle.path(component.graph), tmp_path / "model.onnx")
    shapes = component_shapes(component, bundle.manifest.base.vae.factor, **SIZE)
    assert count_graph(tmp_path / "model.onnx", shapes) == count_component(bundle, "unet", **SIZE)


def test_weight_bytes_match_the_weights_file(bundle: Bundle) -> None:
    """The weights file holds all weights, with padding between them; small constants are in the graph."""
    for name, component in bundle.manifest.components.items():
        model = onnx.load(bundle.path(component.graph), load_external_data=False)
        inline = sum(len(t.raw_data) for t in model.graph.initializer if t.data_location != TensorProto.EXTERNAL)
        stored = count_component(bundle, name, **SIZE).weight_bytes - inline
        assert 0.9 * component.used_bytes < stored <= component.used_bytes


def test_bytes_are_counted_once_and_embedding_tables_by_the_rows_read() -> None:
    conv = count_model(one_node("Conv", {"x": (2, 8, 6, 6)}, {"w": (4, 8, 1, 1)}), {"x": (2, 8, 6, 6)})
    assert conv == Counts(
        flops=2 * 2 * 4 * 36 * 8,
        by_operator={"Conv": 2 * 2 * 4 * 36 * 8},
        weight_bytes=64,
        least_bytes=64 + 2 * (576 + 288),
        activation_bytes=2 * (576 + 288),
    )
    table = numpy_helper.from_array(np.zeros((1000, 4), np.float16), "t")
    ends = [helper.make_tensor_value_info("i", TensorProto.INT64, ["n"])]
    result = [helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)]
    graph = helper.make_graph([helper.make_node("Gather", ["t", "i"], ["y"])], "g", ends, result, [table])
    found = count_model(helper.make_model(graph), {"i": (3,)})
    assert (found.flops, found.weight_bytes, found.least_bytes) == (0, 8000, 24 + 24 + 24)


def test_operands_in_8_bits_are_read_as_such_and_scores_stay_in_their_kernel() -> None:
    """As in an attention in FP8, where TensorRT fuses the two products and the softmax."""
    nodes = []
    for source in ("x", "p"):
        nodes.append(helper.make_node("QuantizeLinear", [source, "scale", "zero"], [f"{source}.narrow"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{source}.narrow", "scale", "zero"], [f"{source}.wide"]))
    nodes.insert(2, helper.make_node("MatMul", ["x.wide", "k"], ["s"]))
    nodes.insert(3, helper.make_node("Softmax", ["s"], ["p"]))
    nodes.append(helper.make_node("MatMul", ["p.wide", "v"], ["y"]))
    held = [numpy_helper.from_array(np.array(1, np.float16), "scale"), numpy_helper.from_array(np.int8(0), "zero")]
    shapes: dict[str, tuple[int, ...]] = {"x": (4, 8), "k": (8, 6), "v": (6, 5)}
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape) for name, shape in shapes.items()]
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)
    graph = helper.make_graph(nodes, "g", ends, [result], held)
    counts = count_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), shapes)
    assert counts.flops == 2 * 4 * 6 * (8 + 5)
    assert counts.activation_bytes == 4 * 8 + 2 * (8 * 6 + 6 * 5 + 4 * 5)


def test_the_embedded_bundle_is_counted() -> None:
    embedded = read_bundle(bundle_path())
    for name in embedded.manifest.components:
        counts = count_component(embedded, name, rows=2, height=128, width=64)
        assert counts.flops > 1e7
        assert counts.least_bytes < counts.weight_bytes + counts.activation_bytes


@pytest.mark.parametrize(
    ("model", "shapes", "error", "words"),
    [
        (one_node("Einsum", {"x": (2, 3)}, equation="ij->ji"), {"x": (2, 3)}, IncompatibleError, "Einsum"),
        (one_node("Abs", {"x": (2, 3)}, domain="com.example"), {"x": (2, 3)}, IncompatibleError, "Abs"),
        (one_node("MatMul", {"x": (2, 3), "z": (4, 5)}), {"x": (2, 3), "z": (4, 5)}, IncompatibleError, "MatMul"),
        (one_node("Abs", {"x": (2, 3)}), {"x": (2, 4)}, UsageError, "input x"),
        (one_node("Abs", {"x": (2, 3)}), {"x": (2,)}, UsageError, "input x"),
        (one_node("Abs", {"x": (2, 3)}), {}, UsageError, "input x"),
        (one_node("Abs", {"x": (2, 3)}), {"x": (2, 3), "z": (1,)}, UsageError, "no input z"),
    ],
)
def test_what_cannot_be_counted_is_refused(
    model: onnx.ModelProto, shapes: dict[str, tuple[int, ...]], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as raised:
        count_model(model, shapes)
    assert "\n" not in str(raised.value)


def test_a_data_dependent_shape_is_refused_if_an_operator_needs_it() -> None:
    nodes = [helper.make_node("NonZero", ["x"], ["i"]), helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT16)]
    nodes.append(helper.make_node("MatMul", ["w", "f"], ["y"]))
    weight = numpy_helper.from_array(np.zeros((3, 2), np.float16), "w")
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [4, 4])]
    result = [helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)]
    model = helper.make_model(helper.make_graph(nodes, "g", ends, result, [weight]))
    with pytest.raises(IncompatibleError, match="depends on more than the sizes"):
        count_model(model, {"x": (4, 4)})


def test_invalid_files_and_sizes_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(CorruptError, match="not an ONNX file"):
        count_graph(tmp_path / "model.onnx", {})
    with pytest.raises(UsageError, match="has no upscaler"):
        count_component(bundle, "upscaler", **SIZE)
    with pytest.raises(SizeError, match="multiples of 2"):
        count_component(bundle, "unet", **SIZE | {"height": 65})
