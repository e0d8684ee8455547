"""The 8-bit graph for ONNX Runtime's CPU provider: uint8 inputs with a zero point, int8 weights, fp32 around them.

Without a zero point its 8-bit kernels are slower than fp32. A linear layer is written as the operator that ONNX Runtime
would fuse itself, since only that takes the bias along. A convolution computes in 8 bits only if its bias is int32 and
its result is quantized.
"""

__all__ = ["quantize_for_cpu"]

from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir

from sdxl_trt.export.eight_bit.formats import unsigned_scale
from sdxl_trt.export.eight_bit.layers import Layer
from sdxl_trt.export.eight_bit.nodes import QuantizingGraph
from sdxl_trt.export.eight_bit.ranges import INPUT, OUTPUT, Ranges
from sdxl_trt.export.eight_bit.store import EightBitWeights, Stored

_CONTRIB = "com.microsoft"
_UNSIGNED = ir.DataType.UINT8


def quantize_for_cpu(
    model: ir.Model, layers: Iterable[Layer], weights: EightBitWeights, ranges: Ranges, folder: Path
) -> None:
    """Let `layers` of `model`, which computes in fp32, compute on uint8 inputs and int8 weights. In place."""
    graph = QuantizingGraph(model.graph, ir.DataType.FLOAT)
    model.opset_imports.setdefault(_CONTRIB, 1)
    for layer in layers:
        scale, zero = unsigned_scale(ranges.of(layer.module + INPUT))
        if layer.node.op_type == "MatMul":
            narrow = graph.quantized(layer.source, float(scale), _UNSIGNED, zero)
            _multiply(graph, layer, narrow, weights.wide_scales[layer.module], folder)
            continue
        graph.narrow_input(layer.node, 0, float(scale), _UNSIGNED, zero)
        graph.narrow_weight(layer, weights.wide_scales[layer.module], folder)
        if layer.kind == "convolution":
            if layer.module in weights.biases:
                _narrow_bias(graph, layer, weights.biases[layer.module], folder)
            scale, zero = unsigned_scale(ranges.of(layer.module + OUTPUT))
            graph.narrow_output(layer.result, float(scale), _UNSIGNED, zero)


def _multiply(graph: QuantizingGraph, layer: Layer, narrow: ir.Value, stored: Stored, folder: Path) -> None:
    """Replace a MatMul, and the addition of its bias, by one operator on 8-bit numbers."""
    quantize, weight, node = narrow.producer(), layer.node.inputs[1], layer.node
    if quantize is None or weight is None:
        raise RuntimeError(f"{layer.module}: was not quantized")
    scale = graph.weight_scale(layer, stored, folder)
    add = _bias_addition(node)
    bias = None if add is None else next(value for value in add.inputs if value is not node.outputs[0])
    inputs = [narrow, weight, quantize.inputs[1], scale, quantize.inputs[2], None, bias]
    fused = ir.node("MatMulIntegerToFloat", inputs if bias is not None else inputs[:5], domain=_CONTRIB,
                    name=f"{node.name}/8_bits")  # fmt: skip
    last = node if add is None else add
    graph.graph.insert_before(last, fused)
    old = [node] if add is None else [node, add]
    ir.convenience.replace_nodes_and_values(graph.graph, last, old, [], [last.outputs[0]], [fused.outputs[0]])


def _bias_addition(node: ir.Node) -> ir.Node | None:
    """Return the node that adds a bias to the result of `node`, if nothing else reads it.

    A bias before Gelu stays: ONNX Runtime adds it in the operator that it fuses for Gelu.
    """
    users = [user for user, _ in node.outputs[0].uses()]
    if len(users) != 1 or users[0].op_type != "Add" or node.outputs[0].is_graph_output():
        return None
    (add,) = users
    other = next((value for value in add.inputs if value is not node.outputs[0]), None)
    while other is not None and (made := other.producer()) is not None and made.op_type in ("Cast", "Split"):
        other = made.inputs[0]
    stored = other is not None and other.is_initializer() and other.shape is not None and len(other.shape) == 1
    followed = any(user.op_type == "Gelu" for user, _ in add.outputs[0].uses())
    return add if stored and not followed else None


def _narrow_bias(graph: QuantizingGraph, layer: Layer, stored: tuple[Stored, Stored], folder: Path) -> None:
    """Let a convolution read its bias in int32. Each has a name of its own: two convolutions may share a bias."""
    names = (f"{layer.module}.bias_int32", f"{layer.module}.bias_scale")
    bias, scale = (each.value(name, folder) for each, name in zip(stored, names, strict=True))
    for each in (bias, scale):
        graph.graph.register_initializer(each)
    layer.node.replace_input_with(2, graph.dequantized(bias, f"{names[0]}/bias", layer.node, scale, 0))
