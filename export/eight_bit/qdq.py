"""The 8-bit graph for TensorRT, and for other providers of GPUs: symmetric formats, floats around the layers.

TensorRT's parser refuses a zero point of activations. It fuses attention in FP8 only if the graph has it as two
products and a softmax, each with its quantizers.
"""

__all__ = ["quantize_for_devices", "refer_to"]

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from sdxl_trt.export.eight_bit.formats import FORMATS, Scheme, activation_scale
from sdxl_trt.export.eight_bit.layers import Attention, Layer, attentions_with
from sdxl_trt.export.eight_bit.nodes import QuantizingGraph, constant
from sdxl_trt.export.eight_bit.ranges import INPUT, Ranges
from sdxl_trt.export.eight_bit.store import EightBitWeights
from sdxl_trt.export.graph import attention_heads

_SOFTMAX = 1.0
"""The largest number that a softmax returns."""


def refer_to(model: ir.Model, weights: EightBitWeights, folder: Path) -> None:
    """Let the initializers of `model` refer to the tensors of `weights` in ``folder/weights.data``, in their types."""
    for name, value in model.graph.initializers.items():
        stored = weights.tensors.get(name)
        if stored is not None:
            value.const_value, value.type = stored.tensor(name, folder), ir.TensorType(stored.dtype)


def quantize_for_devices(
    model: ir.Model, layers: Iterable[Layer], weights: EightBitWeights, ranges: Ranges, scheme: Scheme, folder: Path,
    *, wide: bool = False,
) -> None:  # fmt: skip
    """Let `layers` of `model` compute in 8 bits, symmetrically; with FP8 also the attentions with them. In place.

    With `wide` the graph computes in fp32, so that a CPU can show what a GPU will draw.
    """
    form, scales = FORMATS[scheme], weights.wide_scales if wide else weights.scales
    chosen = list(layers)
    attentions = attentions_with(model, {layer.module for layer in chosen})
    floats = ir.DataType.FLOAT if wide or not scales else next(iter(scales.values())).dtype
    graph = QuantizingGraph(model.graph, floats)
    for layer in chosen:
        graph.narrow_input(layer.node, 0, float(activation_scale(ranges.of(layer.module + INPUT), scheme)), form.onnx)
        graph.narrow_weight(layer, scales[layer.module], folder)
    if scheme == "fp8":
        for attention in attentions:
            _decompose(graph, attention, ranges, form.onnx)
        common.RemoveUnusedNodesPass()(model)


def _decompose(graph: QuantizingGraph, attention: Attention, ranges: Ranges, dtype: ir.DataType) -> None:
    """Replace an attention by its two products, in 8 bits, and its softmax, which TensorRT fuses again."""
    node, name = attention.node, attention.node.name
    query, key, value = attention.sources.values()
    factor = node.attributes["scale"].as_float() if "scale" in node.attributes else _head_width(attention) ** -0.5
    at = np.array(factor, graph.floats.numpy())
    scaled = ir.node("Mul", [query, constant(graph.graph, f"{name}/factor", at)], name=f"{name}/scaled")
    turned = ir.node("Transpose", [key], {"perm": [0, 1, 3, 2]}, name=f"{name}/turned")
    scores = ir.node("MatMul", [scaled.outputs[0], turned.outputs[0]], name=f"{name}/scores")
    shares = ir.node("Softmax", [scores.outputs[0]], {"axis": -1}, name=f"{name}/shares")
    result = ir.node("MatMul", [shares.outputs[0], value], name=f"{name}/result")
    made = [scaled, turned, scores, shares, result]
    for each in made:
        each.outputs[0].name = f"{each.name}.out"
    graph.graph.insert_before(node, made)
    ir.convenience.replace_nodes_and_values(graph.graph, node, [node], [], [node.outputs[0]], [result.outputs[0]])
    spans = {each: ranges.of(f"{attention.module}.{each}") for each in ("q", "k", "v")}
    spans["q"] = (spans["q"][0] * factor, spans["q"][1] * factor)
    inputs = ((scores, 0, spans["q"]), (scores, 1, spans["k"]), (result, 0, (0.0, _SOFTMAX)), (result, 1, spans["v"]))
    for user, place, span in inputs:
        graph.narrow_input(user, place, float(activation_scale(span, "fp8")), dtype)


def _head_width(attention: Attention) -> int:
    """Return the width of an attention's heads, whose number is a size in the Reshape of its queries."""
    heads = attention_heads(_made(_made(attention.node.inputs[0]).inputs[0]))
    if heads is None:
        raise RuntimeError(f"{attention.module}: the number of its heads was not found")
    return attention.width // heads


def _made(value: ir.Value | None) -> ir.Node:
    node = value.producer() if value is not None else None
    if node is None:
        raise RuntimeError(f"{value.name if value else 'a value'}: no node computes it")
    return node
