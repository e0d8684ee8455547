"""An fp16 graph rewritten to compute in fp32 computes what ONNX Runtime computes with it, without its roundings."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from sdxl_trt.export.eight_bit.wide import compute_in_fp32
from sdxl_trt.export.quantize.session import GraphSession

F32, F16 = ir.DataType.FLOAT, ir.DataType.FLOAT16


def _half_types(model: ir.Model) -> list[str]:
    return [f"{node.name}: {node.op_type}" for node in model.graph
            if node.op_type == "Cast" and node.attributes.get_int("to", 0) == F16]  # fmt: skip


def test_a_text_encoder_in_fp16_computes_the_same_in_fp32(eight_bit_bundle: Path) -> None:
    folder = eight_bit_bundle / "text_encoder_2"
    model, wide = (ir.load(folder / "model.onnx") for _ in range(2))
    before = [(value.name, value.dtype, value.shape) for value in (*model.graph.inputs, *model.graph.outputs)]
    compute_in_fp32(wide)
    assert [(value.name, value.dtype, value.shape) for value in (*wide.graph.inputs, *wide.graph.outputs)] == before
    assert len(_half_types(wide)) == sum(value.dtype == F16 for value in wide.graph.outputs)  # only at its end
    ids = np.random.default_rng(0).integers(0, 400, (2, 77))
    inputs: dict[str, Any] = {"input_ids": ids, "embedding_index": np.zeros_like(ids),
                              "embeddings": np.zeros((1, 48), np.float32)}  # fmt: skip
    outputs = [str(value.name) for value in model.graph.outputs]
    with GraphSession(model, folder) as one, GraphSession(wide, folder) as other:
        found, expected = other.run(inputs, outputs), one.run(inputs, outputs)
    for name in outputs:
        # ONNX Runtime computes in fp32 too, but rounds between some nodes; outputs are rounded in both.
        assert np.abs(found[name] - expected[name]).max() <= 2**-9 * np.abs(expected[name]).max()


def test_what_is_shared_with_users_and_outputs_keeps_its_names() -> None:
    x = ir.Value(name="x", type=ir.TensorType(F16), shape=ir.Shape(["n"]))
    weight = ir.Value(name="half", const_value=ir.tensor(np.array([0.1], np.float16), name="half"))
    first = ir.node("Add", [x, weight])
    first.outputs[0].name, first.outputs[0].type = "y", ir.TensorType(F16)
    second = ir.node("Mul", [first.outputs[0], x])
    second.outputs[0].name, second.outputs[0].type = "z", ir.TensorType(F16)
    graph = ir.Graph([x], [first.outputs[0], second.outputs[0]], nodes=[first, second], initializers=[weight],
                     opset_imports={"": 23}, name="small")  # fmt: skip
    model = ir.Model(graph, ir_version=10)
    compute_in_fp32(model)
    import onnxruntime

    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    value = np.array([1.2, 3.4], np.float16)
    y, z = session.run(["y", "z"], {"x": value})
    exact = value.astype(np.float32) + np.float32(np.float16(0.1))
    assert y.dtype == z.dtype == np.float16
    assert np.array_equal(y, exact.astype(np.float16))
    assert np.array_equal(z, (exact * value.astype(np.float32)).astype(np.float16))  # y is not rounded in between


def test_an_fp16_attribute_is_not_overlooked() -> None:
    shape = ir.Value(name="shape", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
    node = ir.node("ConstantOfShape", [shape], {"value": ir.tensor(np.zeros(1, np.float16))}, name="zeros")
    graph = ir.Graph([shape], node.outputs, nodes=[node], opset_imports={"": 23}, name="small")
    with pytest.raises(RuntimeError, match="zeros: ConstantOfShape has an fp16 attribute"):
        compute_in_fp32(ir.Model(graph, ir_version=10))
