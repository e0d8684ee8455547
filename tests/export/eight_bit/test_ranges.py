"""Measured ranges are those of the values themselves, whatever runs; what is no number is refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from sdxl_trt.engines.errors import CorruptError
from sdxl_trt.export.eight_bit.layers import find_attentions, find_layers
from sdxl_trt.export.eight_bit.ranges import Ranges, add_range_outputs
from sdxl_trt.export.quantize.session import GraphSession

NUMBERS = st.floats(-1e30, 1e30)


@pytest.mark.parametrize("graph", ["model.onnx", "cpu.onnx"])
def test_ranges_are_the_extremes_of_all_values_that_the_layers_read_and_write(
    graph: str, pairs: Callable[[str], Any], unet_inputs: Callable[[Any], Any]
) -> None:
    folder = pairs("outline").bundle / "unet"
    watched, whole = ir.load(folder / graph), ir.load(folder / graph)
    values = {}
    for layer in find_layers(whole):
        values[f"{layer.module}.input"] = layer.source
        if layer.kind == "convolution":
            values[f"{layer.module}.output"] = layer.result
    for attention in find_attentions(whole):
        for name, value in zip("qkv", attention.node.inputs, strict=True):
            assert value is not None
            values[f"{attention.module}.{name}"] = value
    assert len([name for name in values if name.endswith(".q")]) == 22
    names = {name: str(value.name) for name, value in values.items()}
    present = {str(value.name) for value in whole.graph.outputs} | {value.name for value in whole.graph.inputs}
    for value in dict.fromkeys(values.values()):
        if value.name not in present:
            value.type = ir.TensorType(ir.DataType.FLOAT)
            whole.graph.outputs.append(value)

    ranges, extremes = Ranges("unet"), add_range_outputs(watched)
    assert len(set(extremes.names)) == 2 * len(dict.fromkeys(values.values()))  # a value of two layers once
    expected: dict[str, tuple[float, float]] = {}
    with GraphSession(watched, folder) as one, GraphSession(whole, folder) as other:
        for seed in (0, 1):
            inputs = unet_inputs(seed)
            extremes.record(one.run(inputs, extremes.names), ranges)
            wanted = [name for name in dict.fromkeys(names.values()) if name not in inputs]
            found = inputs | other.run(inputs, wanted)
            for name, value_name in names.items():
                low, high = expected.get(name, (np.inf, -np.inf))
                expected[name] = min(low, found[value_name].min()), max(high, found[value_name].max())
    assert ranges.spans.keys() == expected.keys()
    # Not the same session: another graph may be fused differently.
    assert np.allclose(list(ranges.spans.values()), [expected[name] for name in ranges.spans], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", [0, 1, 500, 999])
@pytest.mark.parametrize("damage", [np.inf, -np.inf])
def test_infinity_is_refused_wherever_it_lies(place: int, damage: float) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1000, "n"])
    weight = helper.make_tensor("layer.weight", TensorProto.FLOAT, [4, 4], np.eye(4, dtype=np.float32).ravel())
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "layer.weight"], ["y"])], "one", [value],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], [weight])  # fmt: skip
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10))
    extremes = add_range_outputs(model)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((1000, 4)).astype(np.float32)
    ranges = Ranges("unet")
    extremes.record(dict(zip(extremes.names, session.run(extremes.names, {"x": x}), strict=True)), ranges)
    assert ranges.of("layer.input") == (x.min(), x.max())
    x[place, 2] = damage
    found = dict(zip(extremes.names, session.run(extremes.names, {"x": x}), strict=True))
    with pytest.raises(CorruptError, match=r"unet: layer\.input holds NaN or infinity"):
        extremes.record(found, ranges)


@given(spans=st.lists(st.tuples(st.sampled_from("abc"), NUMBERS, NUMBERS), min_size=1))
def test_a_range_widens_and_its_digest_ignores_the_order(spans: list[tuple[str, float, float]]) -> None:
    spans = [(name, min(one, other), max(one, other)) for name, one, other in spans]
    ranges, reversed_ranges = Ranges("one"), Ranges("other")
    for one, other in zip(spans, reversed(spans), strict=True):
        ranges.include(*one)
        reversed_ranges.include(*other)
    for name in ranges.spans:
        assert ranges.of(name) == (min(low for each, low, _ in spans if each == name),
                                   max(high for each, _, high in spans if each == name))  # fmt: skip
    assert ranges.digest() == reversed_ranges.digest()
    low, high = ranges.of(spans[0][0])
    ranges.spans[spans[0][0]] = (low, float(np.nextafter(high, np.inf)))
    assert ranges.digest() != reversed_ranges.digest()


def test_a_value_that_was_not_measured_is_named() -> None:
    with pytest.raises(CorruptError, match=r"unet: the calibration has no range of mid_block\.input"):
        Ranges("unet").of("mid_block.input")
    with pytest.raises(CorruptError):
        Ranges("unet").include("x", 1.0, 0.0)
