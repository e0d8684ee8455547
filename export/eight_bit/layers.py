"""The layers of a graph that can compute in 8 bits, the attentions between them, and which layers stay as they are."""

__all__ = [
    "EXCLUDED", "Attention", "Layer", "LayerKind", "attentions_with", "find_attentions", "find_layers",
    "reason_to_exclude",
]  # fmt: skip

import fnmatch
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from sdxl_trt.engines.bundle import WEIGHT

LayerKind = Literal["linear", "convolution"]

# NVIDIA's ModelOpt leaves out the same layers. Together they are a few percent of the operations; on the 50 M cousin,
# each of the first three kinds alone costs 37 to 41 dB of a step, all else in 8 bits costs 42 dB.
EXCLUDED: Mapping[str, str] = {
    "*conv_in": "reads the latents themselves",
    "*conv_out": "writes the result itself",
    "*conv_shortcut": "carries the residual stream past a block",
    "time_embedding.*": "sees one vector per picture, which every block receives",
    "add_embedding.*": "sees one vector per picture, which every block receives",
    "*time_emb_proj": "sees one vector per picture",
    "post_quant_conv": "reads the latents themselves",
    "quant_conv": "writes the latents themselves",
}
"""Patterns of modules that stay in floating point, with the reason."""
_DISTANCE = 8
"""How many nodes lie between an attention and the linear layer that makes its queries, at most."""


@dataclass(frozen=True)
class Layer:
    """A linear layer or convolution of a graph: its node, its stored weight, and the weight's axis of output channels.

    `half` is 0 or 1 for a node that multiplies by one half of the weight, split along the output channels.
    """

    module: str
    kind: LayerKind
    node: ir.Node
    weight: ir.Value
    axis: int
    half: int | None = None

    @property
    def source(self) -> ir.Value:
        """Return the layer's input."""
        return _given(self.node, 0)

    @property
    def result(self) -> ir.Value:
        """Return the layer's output; a linear layer's bias is added behind it."""
        return self.node.outputs[0]


@dataclass(frozen=True)
class Attention:
    """An attention of a graph: its node, and the linear layer that makes its queries."""

    node: ir.Node
    queries: Layer

    @property
    def module(self) -> str:
        """Return the module it belongs to, the parent of its linear layers."""
        return self.queries.module.rpartition(".")[0]

    @property
    def width(self) -> int:
        """Return the sum of the widths of its heads."""
        if self.queries.weight.shape is None:
            raise RuntimeError(f"{self.queries.module}: the weight has no shape")
        return int(self.queries.weight.shape.numpy()[self.queries.axis])

    @property
    def sources(self) -> dict[str, ir.Value]:
        """Return its inputs by name, whatever the order of their axes is."""
        return {name: _given(self.node, place) for place, name in enumerate(("q", "k", "v"))}


def find_layers(model: ir.Model) -> list[Layer]:
    """Return the linear layers and convolutions with a stored weight, in the order of the graph."""
    found = (_layer(node) for node in model.graph)
    return [layer for layer in found if layer is not None]


def find_attentions(model: ir.Model) -> list[Attention]:
    """Return the attentions, of ONNX or of ONNX Runtime, in the order of the graph."""
    nodes = [node for node in model.graph if node.op_type in ("Attention", "MultiHeadAttention")]
    return [Attention(node, _queries(node)) for node in nodes]


def attentions_with(model: ir.Model, modules: Collection[str]) -> list[Attention]:
    """Return the attentions whose queries a layer of `modules` makes: one stays in floating point with that layer."""
    return [attention for attention in find_attentions(model) if attention.queries.module in modules]


def reason_to_exclude(module: str, further: Mapping[str, str] | None = None) -> str | None:
    """Return why `module` stays in floating point, or None; `further` are a user's patterns with their reasons."""
    for pattern, reason in {**(further or {}), **EXCLUDED}.items():
        if fnmatch.fnmatchcase(module, pattern):
            return reason
    return None


def _layer(node: ir.Node) -> Layer | None:
    if node.op_type not in ("MatMul", "Gemm", "Conv") or len(node.inputs) < 2:
        return None
    weight, half = node.inputs[1], None
    while weight is not None and (made := weight.producer()) is not None:
        if made.op_type not in ("Cast", "Split"):
            return None
        half = made.outputs.index(weight) if made.op_type == "Split" else half
        weight = made.inputs[0]
    if weight is None or not weight.is_initializer() or weight.name is None or not weight.name.endswith(WEIGHT):
        return None
    module = weight.name.removesuffix(WEIGHT)
    if node.op_type == "Conv":
        return Layer(module, "convolution", node, weight, 0)
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    return Layer(module, "linear", node, weight, 0 if transposed else 1, half)


def _queries(attention: ir.Node) -> Layer:
    """Return the linear layer that makes an attention's queries."""
    value = attention.inputs[0]
    for _ in range(_DISTANCE):
        node = value.producer() if value is not None else None
        if node is None:
            break
        layer = _layer(node)
        if layer is not None:
            return layer
        value = next(iter(_computed(node.inputs)), None)
    raise RuntimeError(f"{attention.name}: the linear layer of its queries was not found")


def _computed(values: Iterable[ir.Value | None]) -> Iterable[ir.Value]:
    return (value for value in values if value is not None and value.producer() is not None)


def _given(node: ir.Node, place: int) -> ir.Value:
    value = node.inputs[place]
    if value is None:
        raise RuntimeError(f"{node.name}: input {place} is missing")
    return value
