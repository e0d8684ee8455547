"""The graph as ONNX Runtime's CPU provider runs it fastest: its own attention, its own normalization, no splits.

The rewrites were chosen by measurement (docs/graphs.md). On a CPU, ONNX Runtime expands GroupNormalization to a dozen
operators, each a pass over its input; Attention needs its heads on a separate axis, which copies every query, key,
value and result; and the two halves of a gated layer are copied. The rewrites change no weight and keep the
signature; TensorRT would refuse the result.
"""

__all__ = ["attention_heads", "for_cpu"]

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

_CONTRIB = "com.microsoft"
_SWAP_HEADS = [0, 2, 1, 3]


def for_cpu(model: ir.Model) -> int:
    """Rewrite `model` in place for ONNX Runtime's CPU provider; return the number of replaced nodes.

    Weights need no values. Nodes that do not match this exporter's patterns stay unchanged.
    """
    graph = model.graph
    rewrites = {"Attention": _fuse_heads, "GroupNormalization": _normalize_in_place, "Split": _split_weights}
    count = sum(rewrites[node.op_type](graph, node) for node in list(graph) if node.op_type in rewrites)
    if count:
        model.opset_imports.setdefault(_CONTRIB, 1)
        common.RemoveUnusedNodesPass()(model)
    return count


def _fuse_heads(graph: ir.Graph, node: ir.Node) -> bool:
    """Replace Reshape, Transpose, Attention, Transpose, Reshape by MultiHeadAttention, which splits heads itself."""
    causal, softcap = node.attributes.get_int("is_causal", 0), node.attributes.get_float("softcap", 0.0)
    if len(node.inputs) != 3 or causal or softcap:
        return False
    chains = [_chain(value, "Transpose", "Reshape") for value in node.inputs]
    after = _only_user(node.outputs[0], "Transpose")
    joined = _only_user(after.outputs[0], "Reshape") if after else None
    if joined is None or after is None or any(chain is None for chain in chains):
        return False
    transposes = [chain[0] for chain in chains if chain] + [after]
    reshapes = [chain[1] for chain in chains if chain]
    heads = attention_heads(reshapes[0])
    swapped = all(list(one.attributes["perm"].as_ints()) == _SWAP_HEADS for one in transposes)
    if heads is None or not swapped or any(attention_heads(reshape) != heads for reshape in reshapes):
        return False
    attributes: dict[str, int | float] = {"num_heads": heads}
    if "scale" in node.attributes:
        attributes["scale"] = node.attributes["scale"].as_float()
    sources = [reshape.inputs[0] for reshape in reshapes]
    fused = ir.node("MultiHeadAttention", sources, attributes, domain=_CONTRIB)
    _replace(graph, joined, [fused])
    return True


def _normalize_in_place(graph: ir.Graph, node: ir.Node) -> bool:
    """Replace GroupNormalization by InstanceNormalization over the groups, then the scale and bias of the channels."""
    source, weight, bias = node.inputs
    groups = node.attributes.get_int("num_groups", 0)
    if source is None or weight is None or bias is None or weight.shape is None or weight.dtype is None or not groups:
        return False
    (channels,), dtype = weight.shape.numpy(), weight.dtype.numpy()
    ones, zeros = (_constant(graph, f"groups_{groups}_{name}", np.full(groups, value, dtype))
                   for name, value in (("one", 1), ("zero", 0)))  # fmt: skip
    column = _constant(graph, "column", np.array([1], np.int64))
    by_group = _constant(graph, f"by_{groups}", np.array([0, groups, -1], np.int64))
    by_channel = _constant(graph, f"by_{channels}", np.array([0, channels, -1], np.int64))
    grouped = ir.node("Reshape", [source, by_group])
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    normalized = ir.node("InstanceNormalization", [grouped.outputs[0], ones, zeros], {"epsilon": epsilon})
    apart = ir.node("Reshape", [normalized.outputs[0], by_channel])
    columns = [ir.node("Unsqueeze", [value, column]) for value in (weight, bias)]
    scaled = ir.node("Mul", [apart.outputs[0], columns[0].outputs[0]])
    shifted = ir.node("Add", [scaled.outputs[0], columns[1].outputs[0]])
    shape = ir.node("Shape", [source])
    whole = ir.node("Reshape", [shifted.outputs[0], shape.outputs[0]])
    _replace(graph, node, [grouped, normalized, apart, *columns, scaled, shifted, shape, whole])
    return True


def _split_weights(graph: ir.Graph, node: ir.Node) -> bool:
    """Replace the split of a linear layer's result by two layers; their weights are split once, at load."""
    added = _chain(node.inputs[0], "Add", "MatMul")
    if (
        added is None
        or len(node.outputs) != 2
        or len(node.inputs) != 1
        or any(out.is_graph_output() for out in node.outputs)
    ):
        return False
    add, product = added
    (source, weight), bias = product.inputs, add.inputs[1]
    if not _is_weight(weight, 2) or not _is_weight(bias, 1) or weight is None or bias is None:
        return False
    weights = ir.node("Split", [weight], {"axis": 1, "num_outputs": 2}, num_outputs=2)
    biases = ir.node("Split", [bias], {"axis": 0, "num_outputs": 2}, num_outputs=2)
    made = [weights, biases]
    for half, result in enumerate(node.outputs):
        multiplied = ir.node("MatMul", [source, weights.outputs[half]])
        shifted = ir.node("Add", [multiplied.outputs[0], biases.outputs[half]])
        made += [multiplied, shifted]
        ir.convenience.replace_all_uses_with(result, shifted.outputs[0])
    graph.insert_before(node, made)
    graph.remove(node, safe=True)
    return True


def _chain(value: ir.Value | None, *operators: str) -> tuple[ir.Node, ir.Node] | None:
    """Return the two nodes that made `value`, the last first, if they are `operators` and `value` has one user."""
    last = value.producer() if value is not None else None
    if last is None or last.op_type != operators[0] or len(list(last.outputs[0].uses())) != 1 or last.inputs[0] is None:
        return None
    first = last.inputs[0].producer()
    return (last, first) if first is not None and first.op_type == operators[1] else None


def _only_user(value: ir.Value, operator: str) -> ir.Node | None:
    users = [user for user, _ in value.uses()]
    return users[0] if len(users) == 1 and users[0].op_type == operator and not value.is_graph_output() else None


def attention_heads(reshape: ir.Node) -> int | None:
    """Return the third of the four target sizes of a Reshape, the number of heads; None if unknown."""
    target = reshape.inputs[1]
    sizes = ir.convenience.get_const_tensor(target) if target is not None else None
    if sizes is not None:
        values = sizes.numpy()
        return int(values[2]) if values.size == 4 else None
    made = target.producer() if target is not None else None
    if made is None or made.op_type != "Concat" or len(made.inputs) != 4 or made.inputs[2] is None:
        return None
    size = ir.convenience.get_const_tensor(made.inputs[2])
    return None if size is None or size.size != 1 else int(size.numpy().item())


def _is_weight(value: ir.Value | None, rank: int) -> bool:
    return value is not None and value.is_initializer() and value.shape is not None and len(value.shape) == rank


def _constant(graph: ir.Graph, name: str, value: np.ndarray) -> ir.Value:
    """Return the graph's initializer with `value`, creating it on first use."""
    name = f"cpu.{name}.{value.dtype}"
    if name not in graph.initializers:
        graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(value, name=name)))
    return graph.initializers[name]


def _replace(graph: ir.Graph, node: ir.Node, made: Sequence[ir.Node]) -> None:
    """Replace `node` by the nodes `made`; the last one's output takes the name of the node's output."""
    graph.insert_before(node, made)
    ir.convenience.replace_nodes_and_values(graph, node, [node], [], list(node.outputs), list(made[-1].outputs))
