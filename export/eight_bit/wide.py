"""A graph that computes in fp32 on weights that are stored in fp16, with inputs and outputs as they were.

ONNX Runtime's CPU provider does the same with an fp16 graph by itself. Quantized operators need it in the graph: their
scales are fp32 there.
"""

__all__ = ["compute_in_fp32"]

import onnx_ir as ir

_HALF = ir.DataType.FLOAT16


def compute_in_fp32(model: ir.Model) -> None:
    """Rewrite `model` in place to compute in fp32 wherever it computed in fp16.

    Stored fp16 weights keep their type and are cast, which ONNX Runtime does once, at load; small constants are
    replaced.
    """
    graph = model.graph
    for node in graph:
        if node.op_type == "Cast" and node.attributes.get_int("to", 0) == _HALF:
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
        elif any(_is_half_tensor(attribute) for attribute in node.attributes.values()):
            raise RuntimeError(f"{node.name}: {node.op_type} has an fp16 attribute, which was not expected")
    for value in [value for value in graph.inputs if _is_half(value)]:
        _widen(graph, value)
    for value in [value for value in graph.initializers.values() if _is_half(value)]:
        tensor = value.const_value
        if tensor is None or isinstance(tensor, ir.ExternalTensor):
            _widen(graph, value)
        else:
            value.const_value = ir.tensor(tensor.numpy().astype("float32"), name=value.name)
            value.type = ir.TensorType(ir.DataType.FLOAT)  # a clone of the graph shares the old one
    for value in [value for value in graph.outputs if _is_half(value)]:
        _narrow(graph, value)


def _is_half(value: ir.Value) -> bool:
    """Return whether a value is fp16; an initializer of a graph that was read may know it from its tensor only."""
    dtype = value.dtype
    return (value.const_value.dtype if dtype is None and value.const_value is not None else dtype) == _HALF


def _is_half_tensor(attribute: ir.Attr) -> bool:
    return attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == _HALF


def _widen(graph: ir.Graph, value: ir.Value) -> None:
    """Cast an input or a weight to fp32 for all its users."""
    users = list(value.uses())  # before the cast, which is a user too
    if not users:
        return
    cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{value.name}/fp32")
    cast.outputs[0].name = f"{value.name}/fp32"
    first = next(iter(graph))
    graph.insert_before(first, cast)
    for user, place in users:
        user.replace_input_with(place, cast.outputs[0])


def _narrow(graph: ir.Graph, value: ir.Value) -> None:
    """Cast a result back to fp16; the output keeps its name, type and shape."""
    made = value.producer()
    if made is None:
        raise RuntimeError(f"{value.name}: an output that no node computes")
    cast = ir.node("Cast", [value], {"to": _HALF}, name=f"{value.name}/fp16")
    place = list(graph.outputs).index(value)
    name, kept_type, shape = value.name, value.type, value.shape
    value.name, value.type = f"{name}/fp32", ir.TensorType(ir.DataType.FLOAT)
    narrow = cast.outputs[0]
    narrow.name, narrow.type, narrow.shape = name, kept_type, shape
    graph.outputs[place] = narrow
    graph.insert_after(made, cast)
