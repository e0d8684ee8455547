"""Graph simplifications that need no weight values."""

__all__ = ["fold", "simplify"]

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer

# Adding zero is not removed: it may broadcast.
_NEUTRAL = {"Mul": 1.0, "Div": 1.0}
_MAX_ROUNDS = 4


def simplify(model: ir.Model) -> dict[str, tuple[int, ...]]:
    """Simplify `model` in place; return {weight: permutation} for weights that must now be stored transposed.

    Folds constants, drops identities, duplicates, dead nodes and metadata, and removes the transposes of weights.
    Weights must have no values yet, so that none is folded in memory.
    """
    weights = {name for name, value in model.graph.initializers.items() if value.const_value is None}
    fold(model)
    permutations = _hoist_transposes(model.graph, weights)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.RemoveUnusedNodesPass()(model)
    common.ClearMetadataAndDocStringPass()(model)
    _forget_inner_shapes(model.graph)
    return permutations


def fold(model: ir.Model) -> None:
    """Fold constants and drop identities, duplicates and dead nodes until nothing changes, _MAX_ROUNDS at most."""
    for _ in range(_MAX_ROUNDS):
        before = model.graph.num_nodes()
        optimizer.fold_constants(model, onnx_shape_inference=False)
        _drop_neutral(model.graph)
        _share_sizes(model.graph)
        common.IdentityEliminationPass()(model)
        common.CommonSubexpressionEliminationPass()(model)
        common.RemoveUnusedNodesPass()(model)
        if model.graph.num_nodes() == before:
            break


def _constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    return None if value is None else ir.convenience.get_const_tensor(value)


def _drop_neutral(graph: ir.Graph) -> None:
    """Replace x * 1 and x / 1 by x."""
    for node in list(graph):
        neutral = _NEUTRAL.get(node.op_type)
        other = _constant(node.inputs[1]) if neutral is not None else None
        if other is None or other.size != 1 or len(other.shape) > 1 or other.numpy().item() != neutral:
            continue
        source, result = node.inputs[0], node.outputs[0]
        if source is None or result.is_graph_output() or (len(other.shape) == 1 and not source.shape):
            continue
        ir.convenience.replace_all_uses_with(result, source)
        graph.remove(node, safe=True)


def _share_sizes(graph: ir.Graph) -> None:
    """Keep one Shape node per dynamic size: a graph has few such sizes, but many nodes that ask for them."""
    known: dict[str, ir.Value] = {}
    for node in list(graph):
        symbol = _asked_symbol(node)
        if symbol is None:
            continue
        first = known.setdefault(symbol, node.outputs[0])
        if first is not node.outputs[0]:
            ir.convenience.replace_all_uses_with(node.outputs[0], first)
            graph.remove(node, safe=True)


def _asked_symbol(node: ir.Node) -> str | None:
    """Return the name of the dynamic size that a Shape node returns, if it returns exactly one."""
    source = node.inputs[0] if node.op_type == "Shape" else None
    if source is None or source.shape is None or node.outputs[0].is_graph_output() or "end" not in node.attributes:
        return None
    start = node.attributes.get_int("start", 0)
    end = node.attributes.get_int("end", 0)
    if start is None or end != start + 1 or not 0 <= start < len(source.shape):
        return None
    size = source.shape[start]
    return size.value if isinstance(size, ir.SymbolicDim) else None


def _hoist_transposes(graph: ir.Graph, weights: set[str]) -> dict[str, tuple[int, ...]]:
    """Remove transposes of weights, which are stored transposed instead; return {weight: permutation}."""
    permutations: dict[str, tuple[int, ...]] = {}
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "Transpose" else None
        if source is None or source.name not in weights:
            continue
        perm = tuple(node.attributes["perm"].as_ints())
        if any(user is not node for user, _ in source.uses()):
            continue  # used both ways: stored once, untransposed
        permutations[source.name] = perm
        source.shape = ir.Shape([source.shape[axis] for axis in perm]) if source.shape is not None else None
        ir.convenience.replace_all_uses_with(node.outputs[0], source)
        graph.remove(node, safe=True)
    return permutations


def _forget_inner_shapes(graph: ir.Graph) -> None:
    """Drop torch's symbols (s17, 4*s9) from inner values: engines infer shapes, and files stay reproducible."""
    outputs = {id(value) for value in graph.outputs}
    for node in graph:
        for value in node.outputs:
            if id(value) not in outputs:
                value.shape = None
                value.type = None
