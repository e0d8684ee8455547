"""Merged upsampling gives PyTorch's interpolation and convolution, and leaves every other resizing as it is."""

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from sdxl_trt.export.graph.upsampling import merge_upsampling

IN, OUT = 64, 66
MERGED = {"Conv": 1, "DepthToSpace": 1, "Slice": 1}
Floats = np.ndarray[Any, np.dtype[Any]]


def _weights(seed: int, inputs: int = IN, outputs: int = OUT) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((outputs, inputs, 3, 3)) / np.sqrt(9 * inputs)).astype(np.float32)
    return weight, rng.standard_normal(outputs).astype(np.float32)


def _model(
    weight: Floats, bias: Floats | None, *, cast: int = 0, resize: dict[str, Any] | None = None,
    conv: dict[str, Any] | None = None, scales: tuple[float, ...] = (1, 1, 2, 2), read_twice: bool = False,
) -> ir.Model:  # fmt: skip
    """Return a graph of a Resize and a Conv as diffusers' upsampling is exported; with `cast`, a Cast between them."""
    enlarged = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
    convolved: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1] * 4, "strides": [1, 1], "dilations": [1, 1]}
    convolved |= {"group": 1} | (conv or {})
    dtype = helper.np_dtype_to_tensor_dtype(weight.dtype)
    given_as = TensorProto.FLOAT16 if cast else dtype
    nodes = [helper.make_node("Resize", ["x", "", "scales"], ["large"], **{**enlarged, **(resize or {})})]
    nodes += [helper.make_node("Cast", ["large"], ["wide"], to=cast)] if cast else []
    names = ["wide" if cast else "large", "conv.weight"] + ([] if bias is None else ["conv.bias"])
    nodes.append(helper.make_node("Conv", names, ["out"], name="conv", **convolved))
    stored = {"scales": np.array(scales, np.float32), "conv.weight": weight}
    stored |= {} if bias is None else {"conv.bias": bias}
    outputs = [helper.make_tensor_value_info("out", dtype, ["pictures", len(weight), "rows", "columns"])]
    outputs += [helper.make_tensor_value_info("large", given_as, None)] if read_twice else []
    inputs = weight.shape[1] * convolved["group"]
    graph = helper.make_graph(
        nodes, "upsampling", [helper.make_tensor_value_info("x", given_as, ["pictures", inputs, "h", "w"])],
        outputs, [numpy_helper.from_array(value, name) for name, value in stored.items()],
    )  # fmt: skip
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10))


def _run(model: ir.Model, x: Floats) -> Floats:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    content = ir.to_proto(model)
    onnx.checker.check_model(content)
    session = ort.InferenceSession(content.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: Floats = session.run(None, {"x": x})[0]
    return result


def _exact(x: Floats, weight: Floats, bias: Floats | None) -> Floats:
    """Return what PyTorch makes of it in double precision."""
    wide = [None if each is None else torch.from_numpy(each).double() for each in (x, weight, bias)]
    assert wide[0] is not None
    large = torch.nn.functional.interpolate(wide[0], scale_factor=2.0, mode="nearest")
    result: Floats = torch.nn.functional.conv2d(large, *wide[1:], padding=1).numpy()
    return result


def _operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph if node.op_type in ("Resize", *MERGED))


@settings(max_examples=30)
@given(
    sides=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    pictures=st.integers(1, 3),
    seed=st.integers(0, 99),
    biased=st.booleans(),
)
def test_the_result_is_that_of_pytorch(sides: tuple[int, int], pictures: int, seed: int, biased: bool) -> None:
    weight, bias = _weights(seed)
    model = _model(weight, bias if biased else None)
    x = np.random.default_rng(seed).standard_normal((pictures, IN, *sides), dtype=np.float32)
    assert merge_upsampling(model) == 1
    assert _operators(model) == MERGED
    np.testing.assert_allclose(_run(model, x), _exact(x, weight, bias if biased else None), rtol=0, atol=1e-5)


def test_fp16_weights_are_summed_in_fp32(rng: np.random.Generator) -> None:
    weight, bias = (each.astype(np.float16) for each in _weights(0))
    model = _model(weight, bias)
    x = rng.standard_normal((1, IN, 5, 7)).astype(np.float16)
    exact = _exact(x, weight, bias)
    before = float(np.abs(_run(model, x) - exact).max())
    assert merge_upsampling(model) == 1
    # Both round the result to fp16; the sums are rounded as often as any stored weight.
    assert float(np.abs(_run(model, x) - exact).max()) < 2 * before


def test_a_cast_of_the_enlarged_picture_moves_before_it(rng: np.random.Generator) -> None:
    weight, bias = _weights(0)
    model = _model(weight, bias, cast=TensorProto.FLOAT)
    x = rng.standard_normal((1, IN, 4, 3)).astype(np.float16)
    assert merge_upsampling(model) == 1
    assert _operators(model) == MERGED
    np.testing.assert_allclose(_run(model, x), _exact(x, weight, bias), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"resize": {"mode": "linear"}}, id="linear"),
        pytest.param({"resize": {"nearest_mode": "ceil"}}, id="the next neighbour"),
        pytest.param({"resize": {"coordinate_transformation_mode": "half_pixel"}}, id="half pixels"),
        pytest.param({"scales": (1, 1, 2, 3)}, id="another factor"),
        pytest.param({"scales": (1, 1, 1, 1)}, id="no factor"),
        pytest.param({"conv": {"pads": [0] * 4}}, id="not padded"),
        pytest.param({"conv": {"pads": [0, 0, 2, 2]}}, id="padded on one side"),
        pytest.param({"conv": {"strides": [2, 2]}}, id="strides"),
        pytest.param({"conv": {"dilations": [2, 2], "pads": [2] * 4}}, id="dilated"),
        pytest.param({"read_twice": True}, id="the enlarged picture is a result"),
    ],
)
def test_what_differs_stays(changes: dict[str, Any]) -> None:
    model = _model(*_weights(0), **changes)
    before = _operators(model)
    assert merge_upsampling(model) == 0
    assert _operators(model) == before


@pytest.mark.parametrize(("inputs", "outputs"), [(63, 64), (64, 63)])
def test_few_channels_stay(inputs: int, outputs: int) -> None:
    model = _model(*_weights(0, inputs, outputs))
    assert merge_upsampling(model) == 0


def test_groups_stay() -> None:
    model = _model(*_weights(0), conv={"group": 2})
    assert merge_upsampling(model) == 0
