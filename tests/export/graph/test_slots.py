"""Slots: a graph with LoRAs as inputs equals the graph whose weights have them, and without LoRAs the graph itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from sdxl_trt.engines.bundle.bundle import Bundle, read_bundle
from sdxl_trt.engines.bundle.tensor_table import Slot, is_slot_input, read_table
from sdxl_trt.engines.engine import numpy_dtype
from sdxl_trt.export.graph.slots import add_slots

Arrays = dict[str, np.ndarray]
TOLERANCE = 1e-5
SIZES = {"rows": 3, "height": 16, "width": 16, "tokens": 77, "prompts": 3, "vectors": 9}
WEIGHTS = {
    "linear.weight": (8, 6),
    "flat.weight": (5, 8),
    "conv.weight": (5, 8, 3, 3),
    "text_projection.weight": (4, 8),
}


def _session(model: ir.Model) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def _small(weights: Arrays, *, dtype: int = TensorProto.FLOAT) -> ir.Model:
    """Return a graph with a linear layer that runs twice, a flat one, a strided convolution, and a projection."""
    nodes = [
        helper.make_node("MatMul", ["x", "linear.weight"], ["a"]),
        helper.make_node("MatMul", ["a0", "linear.weight"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["once"]),
        helper.make_node("Gemm", ["t", "flat.weight", "bias"], ["two"], transB=1),
        helper.make_node("Conv", ["picture", "conv.weight"], ["three"], kernel_shape=[3, 3], strides=[2, 2]),
        helper.make_node("Gemm", ["t", "text_projection.weight"], ["four"], transB=1),
    ]
    shapes = {"x": ["rows", "tokens", 8], "a0": ["rows", "tokens", 8], "t": ["rows", 8], "picture": ["rows", 8, 9, 9]}
    values = [helper.make_tensor_value_info(name, dtype, shape) for name, shape in shapes.items()]
    outputs = [helper.make_tensor_value_info(name, dtype, None) for name in ("once", "two", "three", "four")]
    kept = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    if dtype == TensorProto.BFLOAT16:
        kept = [helper.make_tensor(each.name, dtype, each.dims, numpy_helper.to_array(each).ravel()) for each in kept]
    graph = helper.make_graph(nodes, "small", values, outputs, kept)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10))


@pytest.fixture
def weights(rng: np.random.Generator) -> Arrays:
    shapes: dict[str, tuple[int, ...]] = {**WEIGHTS, "bias": (5,)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def feed(rng: np.random.Generator) -> Arrays:
    shapes = {"x": (3, 7, 8), "a0": (3, 7, 8), "t": (3, 8), "picture": (3, 8, 9, 9)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def _factors(slots: tuple[Slot, ...], rank: int, rng: np.random.Generator, adapters: int = 1) -> Arrays:
    """Return random inputs for slots."""
    found = {}
    for slot in slots:
        for name, shape in slot.shapes(adapters, rank).items():
            found[name] = (rng.standard_normal(shape) / 8).astype(np.float32)
    return found


def _changed(weights: Arrays, slots: tuple[Slot, ...], factors: Arrays, row: int = 0) -> Arrays:
    """Return `weights` with the factors of one row added."""
    changed = dict(weights)
    for slot in slots:
        down, up = (factors[name] for name in slot.shapes())
        name = f"{slot.module}.weight"
        if slot.kernel:
            changed[name] = weights[name] + (up @ down).reshape(weights[name].shape)
        else:
            product = down[row] @ up[row]  # (in, out), as a MatMul's weight is stored
            changed[name] = weights[name] + (product if name == "linear.weight" else product.T)
    return changed


@pytest.mark.parametrize("rank", [0, 1, 4])
def test_a_slot_adds_the_product_to_its_weight(weights: Arrays, feed: Arrays, rank: int, rng: Any) -> None:
    model = _small(weights)
    slots = add_slots(model)
    assert {slot.module: (slot.outputs, slot.inputs, slot.kernel) for slot in slots} == {
        "linear": (6, 8, ()), "flat": (5, 8, ()), "conv": (5, 8, (3, 3)),
    }, "the pooled prompt's projection has no slot"  # fmt: skip
    factors = _factors(slots, rank, rng)
    found = _session(model).run(None, feed | factors)
    expected = _session(_small(_changed(weights, slots, factors))).run(None, feed)
    plain = _session(_small(weights)).run(None, feed)
    for name, one, other, before in zip(("once", "two", "three", "four"), found, expected, plain, strict=True):
        np.testing.assert_allclose(one, other, atol=TOLERANCE, err_msg=name)
        if rank == 0:
            np.testing.assert_allclose(one, before, rtol=1e-6, atol=TOLERANCE)
        elif name != "four":
            assert np.abs(one - before).max() > 0.01, f"{name} is not changed"


def test_every_row_may_have_loras_of_its_own(weights: Arrays, feed: Arrays, rng: np.random.Generator) -> None:
    model = _small(weights)
    slots = add_slots(model, per_row=True)
    assert [slot.module for slot in slots] == ["linear", "flat"], "a convolution has one kernel for all rows"
    assert all(value.shape[0].value == "rows" for value in model.graph.inputs if is_slot_input(str(value.name)))
    factors = _factors(slots, 4, rng, adapters=3)
    together = _session(model).run(None, feed | factors)
    for row in range(3):
        alone = _session(_small(_changed(weights, slots, factors, row))).run(
            None, {name: array[row : row + 1] for name, array in feed.items()}
        )
        for one, other in zip(together, alone, strict=True):
            np.testing.assert_allclose(one[row : row + 1], other, atol=TOLERANCE)


def test_a_bf16_graph_takes_fp32_and_casts(weights: Arrays) -> None:
    model = _small(weights, dtype=TensorProto.BFLOAT16)
    add_slots(model)
    slots = [value for value in model.graph.inputs if is_slot_input(str(value.name))]
    assert {value.dtype for value in slots} == {ir.DataType.FLOAT}
    assert all(user.op_type == "Cast" for value in slots for user, _ in value.uses())
    assert all(node.inputs[0] in slots for node in model.graph if node.op_type == "Cast")


def _inputs(bundle: Bundle, name: str, rng: np.random.Generator) -> Arrays:
    found = {}
    for spec in bundle.manifest.components[name].inputs:
        shape = [SIZES[axis] if isinstance(axis, str) else axis for axis in spec.shape]
        values = rng.integers(0, 9, shape) if spec.dtype == "int64" else rng.standard_normal(shape)
        found[spec.name] = values.astype(numpy_dtype(spec))
    return found


def _open(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", ["unet", "refiner_unet", "text_encoder", "text_encoder_2"])
def test_every_module_of_an_exported_graph_has_a_slot(pairs: Callable[[str], Any], name: str, rng: Any) -> None:
    bundle = read_bundle(pairs("outline").bundle)
    table = read_table(bundle, name)
    modules = {each.removesuffix(".weight") for each, shape in table.shapes.items() if len(shape) in (2, 4)}
    without = {module for module in modules if "embedding" in module.rpartition(".")[2]} | {"text_projection"}
    assert set(table.slots) == modules - without
    root = bundle.root / name
    plain, slotted = (_open(root / file) for file in ("model.onnx", "adapters.onnx"))
    feed = _inputs(bundle, name, rng)
    factors = _factors(tuple(table.slots_by_module.values()), 0, rng)
    assert [each.name for each in slotted.get_inputs()] == [*feed, *factors]
    for one, other in zip(slotted.run(None, feed | factors), plain.run(None, feed), strict=True):
        np.testing.assert_allclose(one, other, atol=5e-6)  # ONNX Runtime prepares constant kernels


@pytest.mark.parametrize("name", ["vae_decoder", "vae_encoder"])
def test_an_autoencoder_has_no_slot_graph(pairs: Callable[[str], Any], name: str) -> None:
    bundle = read_bundle(pairs("outline").bundle)
    assert bundle.manifest.components[name].slot_graph is None
    assert not read_table(bundle, name).slots
