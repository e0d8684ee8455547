"""Residual inputs of a traced graph: a UNet's skip connections, and a ControlNet's sum with an earlier ControlNet.

A residual may have one row and one pixel, which broadcasts: zeros of that shape change nothing, so a run without a
ControlNet needs no second graph. The graph is rewritten, not traced again: a trace would have to choose between one
pixel and many.
"""

__all__ = ["EARLIER", "add_residuals"]

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from sdxl_trt.engines import SourceError
from sdxl_trt.export.graph.signatures import residual_names, residual_shapes

EARLIER = "earlier_"
"""The prefix of a ControlNet's inputs for the residuals of an earlier one."""
_DIMENSIONS = 4


def add_residuals(model: ir.Model, kind: str, config: Mapping[str, Any], where: str) -> None:
    """Give a traced `model` of `kind` "unet" or "controlnet" inputs for residuals.

    A UNet adds `down_residual.i` to its skip connections, only where an up block takes them, and `mid_residual` to
    what the first up block takes. A ControlNet adds ``earlier_`` residuals to its outputs. Raises SourceError for a
    UNet without the expected skip connections.
    """
    shapes = residual_shapes(config)
    names = residual_names(len(shapes))
    outside = next(value.dtype for value in model.graph.inputs if value.name == "sample")
    prefix = EARLIER if kind == "controlnet" else ""
    inputs = []
    for name, (channels, divisor) in zip(names, shapes, strict=True):
        sides = [_optional(axis, divisor) for axis in ("height", "width")]
        shape = ir.Shape([_optional("rows", 1), channels, *sides])
        type_ = None if outside is None else ir.TensorType(outside)
        inputs.append(ir.Value(name=prefix + name, shape=shape, type=type_))
    model.graph.inputs.extend(inputs)
    if kind == "controlnet":
        _add_to_outputs(model.graph, inputs)
    else:
        _add_to_skips(model.graph, inputs, where)


def _optional(axis: str, divisor: int) -> str:
    return f"{axis}|1" if divisor == 1 else f"{axis}/{divisor}|1"


def _add_to_skips(graph: ir.Graph, inputs: list[ir.Value], where: str) -> None:
    *down, middle = inputs
    joins = [node for node in graph if _is_join(node)]
    if len(joins) != len(down):
        raise SourceError(f"{where}: the UNet joins {len(joins)} skip connections, {len(down)} expected by its config;"
                          " ControlNets need SDXL's layout")  # fmt: skip
    _add_to_input(graph, joins[0], 0, middle)
    for node, residual in zip(joins, reversed(down), strict=True):
        _add_to_input(graph, node, 1, residual)


def _is_join(node: ir.Node) -> bool:
    """Return whether a node concatenates two feature maps along their channels: a convolution takes the result.

    That is the shortcut of an up block's residual layer, whose channels always change.
    """
    axis = node.attributes.get_int("axis", 0) if node.op_type == "Concat" and len(node.inputs) == 2 else 0
    return axis in (1, 1 - _DIMENSIONS) and any(user.op_type == "Conv" for user, _ in node.outputs[0].uses())


def _add_to_input(graph: ir.Graph, node: ir.Node, index: int, residual: ir.Value) -> None:
    source = node.inputs[index]
    if source is None:
        raise RuntimeError(f"{node.name}: has no input {index}")
    made = _sum(graph, node, source, residual)
    node.replace_input_with(index, made)


def _sum(graph: ir.Graph, before: ir.Node, source: ir.Value, residual: ir.Value) -> ir.Value:
    """Insert source + residual before a node, in the dtype of `source`."""
    if source.dtype is not None and source.dtype != residual.dtype:
        cast = ir.node("Cast", [residual], {"to": source.dtype})
        graph.insert_before(before, cast)
        residual = cast.outputs[0]
    made = ir.node("Add", [source, residual])
    made.outputs[0].shape, made.outputs[0].type = source.shape, source.type
    graph.insert_before(before, made)
    return made.outputs[0]


def _add_to_outputs(graph: ir.Graph, inputs: list[ir.Value]) -> None:
    for index, (output, residual) in enumerate(zip(list(graph.outputs), inputs, strict=True)):
        made = ir.node("Add", [output, residual])
        made.outputs[0].shape, made.outputs[0].type = output.shape, output.type
        graph.append(made)
        made.outputs[0].name, output.name = output.name, f"{output.name}/own"
        graph.outputs[index] = made.outputs[0]
