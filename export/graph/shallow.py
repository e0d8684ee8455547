"""The shallow graph of a UNet: only its outermost level, for the steps of a run that reuse what the others computed.

The full graph gains an output, `deep_feature`: the hidden state that enters its last up block, which is all that the
inner levels pass to the outermost one (DeepCache, arXiv 2312.00858). The shallow graph takes it as an input instead of
computing it, extrapolated from the two latest full steps:

    deep = deep_new + (deep_new - deep_old) · deep_factor

`deep_factor` has one number a row, in fp32, and so has the sum: the difference of two fp16 numbers may be beyond fp16,
and a factor of 0 must return `deep_new` itself.
"""

__all__ = ["cut_shallow", "mark_deep"]

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from sdxl_trt.engines.bundle import DEEP_FEATURE, is_slot_input

_NEW, _OLD, _FACTOR = "deep_new", "deep_old", "deep_factor"
# The name of the node in which both graphs join the hidden state with the outermost level: it outlives rewrites.
_JOIN = "deep_feature/join"
_WIDE = ir.DataType.FLOAT
_MOST_STEPS = 8
"""Nodes between the concatenation, its normalization and that one's weight: reshapes, casts, and a normalization."""


def mark_deep(model: ir.Model, state: Mapping[str, tuple[int, ...]], outside: ir.DataType) -> bool:
    """Add the output `deep_feature`, of type `outside`, to a UNet in place; return whether it has such a value.

    `state` maps the model's published tensor names to shapes. A UNet of one level has no inner ones, and another
    architecture may not concatenate where its last up block begins: they stay as they are.
    """
    join = _find_join(model.graph, state)
    if join is None or join.inputs[0] is None:
        return False
    level = _last_level(state)
    channels = state[_norm(level)][0] - state["conv_in.weight"][0]
    value, inside = join.inputs[0], _dtype_of(model.graph, _norm(level))
    join.name = _JOIN
    if inside != outside:
        cast = ir.node("Cast", [value], {"to": outside}, name=f"{DEEP_FEATURE}/cast")
        model.graph.insert_before(join, cast)
        value = cast.outputs[0]
    value.name, value.type = DEEP_FEATURE, ir.TensorType(outside)
    value.shape = ir.Shape(["rows", channels, "height", "width"])
    model.graph.outputs.append(value)
    return True


def cut_shallow(model: ir.Model, inside: ir.DataType) -> None:
    """Make the shallow graph of a full one in place; `inside` is the type in which it computes.

    The full graph was marked by `mark_deep`, and possibly rewritten or quantized since. Inputs, weights and the output
    that the shallow graph does not need are gone.
    """
    graph = model.graph
    deep = next(value for value in graph.outputs if value.name == DEEP_FEATURE)
    join = next(node for node in graph if node.name == _JOIN)
    graph.outputs.remove(deep)
    new, old = (ir.Value(name=name, type=deep.type, shape=deep.shape) for name in (_NEW, _OLD))
    factor = ir.Value(name=_FACTOR, type=ir.TensorType(_WIDE), shape=ir.Shape(["rows"]))
    join.replace_input_with(0, _extrapolated(graph, join, new, old, factor, inside))
    common.RemoveUnusedNodesPass()(model)
    for value in [value for value in graph.inputs if not value.uses()]:
        graph.inputs.remove(value)
    slots = [value for value in graph.inputs if is_slot_input(str(value.name))]  # they follow the graph's own
    own = [value for value in graph.inputs if value not in slots]
    graph.inputs.clear()
    graph.inputs.extend([*own, new, old, factor, *slots])


def _extrapolated(
    graph: ir.Graph, before: ir.Node, new: ir.Value, old: ir.Value, factor: ir.Value, inside: ir.DataType
) -> ir.Value:
    """Insert the extrapolation before a node; return its result in the type `inside`."""
    axes_name = "deep_factor.axes"
    axes = ir.Value(name=axes_name, const_value=ir.tensor(np.array([1, 2, 3], np.int64), name=axes_name))
    graph.register_initializer(axes)
    made: list[ir.Node] = []

    def add(operator: str, inputs: list[ir.Value], name: str, **attributes: int) -> ir.Value:
        node = ir.node(operator, inputs, attributes, name=f"deep/{name}")
        node.outputs[0].name = f"deep/{name}.out"
        made.append(node)
        return node.outputs[0]

    def cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
        return value if value.dtype == dtype else add("Cast", [value], name, to=int(dtype))

    new, old = cast(new, _WIDE, "new"), cast(old, _WIDE, "old")
    change = add("Sub", [new, old], "change")
    scaled = add("Mul", [change, add("Unsqueeze", [factor, axes], "factor")], "scaled")
    total = add("Add", [new, scaled], "sum")
    total = total if inside == _WIDE else add("Cast", [total], "deep", to=int(inside))
    graph.insert_before(before, made)
    return total


def _find_join(graph: ir.Graph, state: Mapping[str, tuple[int, ...]]) -> ir.Node | None:
    """Return the node that concatenates the hidden state of the last up block with the first skip connection."""
    level = _last_level(state)
    weight = graph.initializers.get(_norm(level)) if level else None
    node = None if weight is None else _producer(_normalized(weight))
    for _ in range(_MOST_STEPS):
        if node is None or node.op_type == "Concat":
            break
        node = _producer(node.inputs[0])
    if node is None or node.op_type != "Concat" or len(node.inputs) != 2:
        return None
    return node if node.attributes.get_int("axis", 0) in (1, -3) else None


def _normalized(weight: ir.Value) -> ir.Value | None:
    """Return what is normalized, and scaled by `weight`: in older opsets in steps, at the end of which it is scaled."""
    value = weight
    for _ in range(_MOST_STEPS):
        users = [user for user, _ in value.uses()]
        if len(users) != 1:
            return None
        if users[0].op_type == "GroupNormalization":
            return users[0].inputs[0]
        if users[0].op_type == "Mul":
            return next((other for other in users[0].inputs if other is not value), None)
        value = users[0].outputs[0]
    return None


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _last_level(state: Mapping[str, tuple[int, ...]]) -> int:
    levels = [int(name.split(".")[1]) for name in state if name.startswith("up_blocks.")]
    return max(levels, default=0)


def _norm(level: int) -> str:
    return f"up_blocks.{level}.resnets.0.norm1.weight"


def _dtype_of(graph: ir.Graph, name: str) -> ir.DataType:
    """Return the type of a weight, in which its layer computes."""
    dtype = graph.initializers[name].dtype
    if dtype is None:
        raise RuntimeError(f"{name}: has no type")
    return dtype
