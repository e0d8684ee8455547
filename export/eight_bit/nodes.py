"""Nodes that quantize: QuantizeLinear and DequantizeLinear with their scales, inserted where their values are made."""

__all__ = ["QuantizingGraph", "constant"]

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sdxl_trt.export.eight_bit.layers import Layer
from sdxl_trt.export.eight_bit.store import Stored

_ZEROS: dict[ir.DataType, np.dtype[np.generic]] = {
    ir.DataType.INT8: np.dtype(np.int8), ir.DataType.UINT8: np.dtype(np.uint8), ir.DataType.INT32: np.dtype(np.int32),
    ir.DataType.FLOAT8E4M3FN: np.dtype(ml_dtypes.float8_e4m3fn),
}  # fmt: skip


@dataclass
class QuantizingGraph:
    """A graph that gains quantizing nodes. A value is quantized once, and dequantized for each of its users.

    `floats` is the type of the graph's scales: fp16 or fp32.
    """

    graph: ir.Graph
    floats: ir.DataType
    _known: dict[ir.Value, ir.Value] = field(default_factory=dict)

    def quantized(self, value: ir.Value, scale: float, dtype: ir.DataType, zero: int = 0) -> ir.Value:
        """Return `value` in 8 bits; a value that was quantized before, as it was then."""
        known = self._known.get(value)
        if known is None:
            name = f"{value.name}/quantized"
            inputs = [value, *self._parameters(name, np.array(scale), dtype, zero)]
            node = _node("QuantizeLinear", inputs, name)
            known = self._known[value] = node.outputs[0]
            made = value.producer()
            if made is None:
                self.graph.insert_before(next(iter(self.graph)), node)
            else:
                self.graph.insert_after(made, node)
        return known

    def dequantized(self, value: ir.Value, name: str, before: ir.Node, scale: ir.Value, axis: int) -> ir.Value:
        """Return a stored tensor in floating point, with a scale for each index of `axis`; inserted before a node."""
        zero = constant(self.graph, f"{name}.zero", np.zeros(_length(scale), _zero_dtype(value)))
        node = _node("DequantizeLinear", [value, scale, zero], name, {"axis": axis})
        self.graph.insert_before(before, node)
        return node.outputs[0]

    def weight_scale(self, layer: Layer, stored: Stored, folder: Path) -> ir.Value:
        """Return the scales of a layer's weight as an initializer; of half of a weight, those of its channels."""
        name = f"{layer.module}.weight_scale"
        if layer.half is not None:
            stored, name = stored.part(layer.half), f"{name}.{layer.half}"
            weight = layer.node.inputs[1]
            if weight is not None:
                weight.type = layer.weight.type  # half of an 8-bit weight
        scale = stored.value(name, folder)
        self.graph.register_initializer(scale)
        return scale

    def narrow_weight(self, layer: Layer, stored: Stored, folder: Path) -> None:
        """Let a layer read its weight, which is stored in 8 bits."""
        scale, weight = self.weight_scale(layer, stored, folder), layer.node.inputs[1]
        if weight is None:
            raise RuntimeError(f"{layer.module}: has no weight")
        wide = self.dequantized(weight, f"{scale.name}/weight", layer.node, scale, layer.axis)
        layer.node.replace_input_with(1, wide)

    def narrow_input(self, user: ir.Node, place: int, scale: float, dtype: ir.DataType, zero: int = 0) -> None:
        """Pass an input of `user` through 8 bits."""
        value = user.inputs[place]
        if value is None:
            raise RuntimeError(f"{user.name}: input {place} is missing")
        narrow = self.quantized(value, scale, dtype, zero)
        user.replace_input_with(place, self._dequantize(narrow, f"{user.name}/input.{place}", user))

    def narrow_output(self, value: ir.Value, scale: float, dtype: ir.DataType, zero: int) -> None:
        """Pass a result through 8 bits, for all its users; one that is an output besides is that, dequantized.

        A result that only leaves the graph stays in floating point.
        """
        users = list(value.uses())  # before the new node, which is a user too
        narrow = self.quantized(value, scale, dtype, zero)
        made = narrow.producer()
        if made is None:
            raise RuntimeError(f"{value.name}: was not quantized")
        for user, place in users:
            if user is not made:
                name = f"{user.name}/{value.name}.{place}"
                user.replace_input_with(place, self._dequantize(narrow, name, user))
        others = [user for user, _ in users if user is not made]
        if value.is_graph_output() and others:
            self._give_out(value, narrow, others[0])

    def _give_out(self, value: ir.Value, narrow: ir.Value, before: ir.Node) -> None:
        """Let the graph return the dequantized `narrow` instead of `value`, under the same name."""
        name = str(value.name)
        place, value.name = list(self.graph.outputs).index(value), f"{name}/float"
        wide = self._dequantize(narrow, name, before)
        wide.name, wide.type, wide.shape = name, value.type, value.shape
        self.graph.outputs[place] = wide

    def _dequantize(self, narrow: ir.Value, name: str, before: ir.Node) -> ir.Value:
        made = narrow.producer()
        if made is None:
            raise RuntimeError(f"{narrow.name}: was not quantized")
        inputs: list[ir.Value | None] = [narrow, *made.inputs[1:]]
        node = _node("DequantizeLinear", inputs, f"{name}/dequantized")
        self.graph.insert_before(before, node)
        return node.outputs[0]

    def _parameters(
        self, name: str, scale: NDArray[np.float64], dtype: ir.DataType, zero: int
    ) -> tuple[ir.Value, ir.Value]:
        return (
            constant(self.graph, f"{name}.scale", scale.astype(self.floats.numpy())),
            constant(self.graph, f"{name}.zero", np.array(zero).astype(_ZEROS[dtype])),
        )


def constant(graph: ir.Graph, name: str, value: NDArray[np.generic]) -> ir.Value:
    """Return a new initializer of `graph`, stored in the graph."""
    initializer = ir.Value(name=name, const_value=ir.tensor(value, name=name))
    graph.register_initializer(initializer)
    return initializer


def _node(
    operator: str, inputs: Sequence[ir.Value | None], name: str, attributes: dict[str, int] | None = None
) -> ir.Node:
    node = ir.node(operator, inputs, attributes or {}, name=name)
    node.outputs[0].name = f"{name}.out"
    return node


def _length(scale: ir.Value) -> int:
    if scale.shape is None:
        raise RuntimeError(f"{scale.name}: has no shape")
    return int(scale.shape.numpy()[0])


def _zero_dtype(value: ir.Value) -> np.dtype[np.generic]:
    if value.dtype is None:
        raise RuntimeError(f"{value.name}: has no type")
    return _ZEROS[value.dtype]
