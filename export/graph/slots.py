"""A second graph over the same weights, whose linear layers and convolutions take LoRAs as inputs: ``adapters.onnx``.

A TensorRT plan holds its weights as constants, so a LoRA that is chosen for a request has to enter as inputs. A module
with such inputs has a *slot*:

- A linear layer computes y = Wx + up · (down · x). Its inputs are ``<module>.lora_down`` of shape (adapters, in, rank)
  and ``<module>.lora_up`` of shape (adapters, rank, out).
- A convolution adds the reshaped product up · down to its kernel. Its inputs are ``<module>.lora_down`` of shape
  (rank, in · kernel) and ``<module>.lora_up`` of shape (out, rank). TensorRT refuses a convolution whose number of
  output maps varies, so that the rank cannot be an axis of a convolution's own.

- An 8-bit layer keeps its weight as a constant, so that its slot is beside it. For a convolution that is a second one,
  whose kernel is the reshaped product.

All slots of a graph have one rank, which may be 0; the LoRA's scale belongs to ``up``. The axis `adapters` is 1: all
rows share the LoRAs. A graph with an own LoRA per row gives that axis the name of the other inputs' first: ``rows``.
"""

__all__ = ["add_slots"]

from collections.abc import Container, Iterable

import numpy as np
import onnx_ir as ir

from sdxl_trt.engines.bundle import WEIGHT, Slot

# A kernel is one for all rows of a call. The pooled prompt's projection has no slot: TensorRT then takes long to build
# the encoder, and few LoRAs change it.
_WITHOUT = ("text_projection",)
_CONSTANT = "slots."


def add_slots(model: ir.Model, *, per_row: bool = False, beside: Container[str] = frozenset()) -> tuple[Slot, ...]:
    """Add a slot to every linear layer and convolution of `model`, in place; return the slots in the graph's order.

    Weights need no values. Their names are the published ones, with ``.weight`` after the module's. The new inputs
    follow the graph's own, in fp32 or fp16: a bf16 graph casts them. With `per_row`, every row has a LoRA of its own,
    and convolutions, which have one kernel for all rows, get no slot. The modules `beside` keep their kernels.
    """
    slots: dict[str, Slot] = {}
    adapters = _first_axis(model.graph) if per_row else 1
    for node in list(model.graph):
        slot = _slot_of(node)
        if slot is None or (per_row and slot.kernel):
            continue
        down, up = _inputs(model.graph, slot, _dtype(node), adapters)
        slots.setdefault(slot.module, slot)
        if slot.kernel and slot.module in beside:
            _add_convolution(model.graph, node, down, up)
        elif slot.kernel:
            _add_to_kernel(model.graph, node, down, up)
        else:
            _add_to_result(model.graph, node, down, up)
    return tuple(slots.values())


def _slot_of(node: ir.Node) -> Slot | None:
    """Return the slot of the module that `node` computes, or None if it is no linear layer or convolution."""
    weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm", "Conv") else None
    if weight is None or not weight.is_initializer() or weight.shape is None or weight.name is None:
        return None
    module = weight.name.removesuffix(WEIGHT)
    if module == weight.name or module.endswith(_WITHOUT):
        return None
    sizes = weight.shape.numpy()
    if node.op_type == "Conv":
        return Slot(module=module, inputs=sizes[1], outputs=sizes[0], kernel=sizes[2:])
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    outputs, inputs = sizes if transposed else sizes[::-1]
    return Slot(module=module, inputs=inputs, outputs=outputs)


def _first_axis(graph: ir.Graph) -> str:
    """Return the name of the first axis of the graph's inputs: with a name of its own, builds did not end."""
    shape = graph.inputs[0].shape
    if shape is None or not isinstance(shape[0], ir.SymbolicDim) or shape[0].value is None:
        raise RuntimeError(f"{graph.inputs[0].name}: its first axis has no name")
    return shape[0].value


def _dtype(node: ir.Node) -> ir.DataType:
    weight = node.inputs[1]
    if weight is None or weight.dtype is None:
        raise RuntimeError(f"{node.name}: the weight has no dtype")
    return weight.dtype


def _inputs(graph: ir.Graph, slot: Slot, dtype: ir.DataType, adapters: int | str) -> tuple[ir.Value, ir.Value]:
    """Return the values `down` and `up` in the module's dtype; a module that runs twice has its inputs once."""
    known = {value.name: value for value in graph.inputs}
    found = []
    outside = ir.DataType.FLOAT if dtype == ir.DataType.BFLOAT16 else dtype
    for name, shape in slot.shapes(adapters).items():
        value = known.get(name)
        if value is None:
            value = ir.Value(name=name, type=ir.TensorType(outside), shape=ir.Shape(list(shape)))
            graph.inputs.append(value)
        found.append(value)
    down, up = found
    return (down, up) if outside == dtype else (_cast(graph, down, dtype), _cast(graph, up, dtype))


def _cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    node = ir.node("Cast", [value], {"to": dtype})
    first = next(iter(graph), None)
    if first is not None:
        graph.insert_before(first, node)
    return node.outputs[0]


def _add_to_result(graph: ir.Graph, node: ir.Node, down: ir.Value, up: ir.Value) -> None:
    """Add up · (down · x) to the result of a linear layer.

    Gemm has two axes, rows and channels, where the factors have three: its rows become an axis of their own.
    """
    source, result, flat = node.inputs[0], node.outputs[0], node.op_type == "Gemm"
    column = _constant(graph, "column", [1]) if flat else None
    widened = ir.node("Unsqueeze", [source, column]) if flat else None
    inner = ir.node("MatMul", [source if widened is None else widened.outputs[0], down])
    outer = ir.node("MatMul", [inner.outputs[0], up])
    narrowed = ir.node("Squeeze", [outer.outputs[0], column]) if flat else outer
    total = ir.node("Add", [result, narrowed.outputs[0]])
    made = [each for each in (widened, inner, outer, narrowed if flat else None, total) if each is not None]
    _name(made, str(node.outputs[0].name))
    _stand_in(result, total)
    graph.insert_after(node, made)


def _add_to_kernel(graph: ir.Graph, node: ir.Node, down: ir.Value, up: ir.Value) -> None:
    """Add the product of the factors, reshaped, to the kernel of a convolution."""
    kernel = node.inputs[1]
    if kernel is None or kernel.shape is None:
        raise RuntimeError(f"{node.name}: the kernel has no shape")
    product = ir.node("MatMul", [up, down])
    reshaped = ir.node("Reshape", [product.outputs[0], _constant(graph, str(kernel.name), list(kernel.shape.numpy()))])
    total = ir.node("Add", [kernel, reshaped.outputs[0]])
    made = [product, reshaped, total]
    _name(made, str(node.outputs[0].name))
    graph.insert_before(node, made)
    node.replace_input_with(1, total.outputs[0])


def _add_convolution(graph: ir.Graph, node: ir.Node, down: ir.Value, up: ir.Value) -> None:
    """Add to the result of a convolution that of a second one, whose kernel is the product of the factors."""
    kernel, source, result = node.inputs[1], node.inputs[0], node.outputs[0]
    if kernel is None or kernel.shape is None:
        raise RuntimeError(f"{node.name}: the kernel has no shape")
    product = ir.node("MatMul", [up, down])
    reshaped = ir.node("Reshape", [product.outputs[0], _constant(graph, str(kernel.name), list(kernel.shape.numpy()))])
    second = ir.node("Conv", [source, reshaped.outputs[0]], dict(node.attributes))
    total = ir.node("Add", [result, second.outputs[0]])
    made = [product, reshaped, second, total]
    _name(made, str(result.name))
    _stand_in(result, total)
    graph.insert_after(node, made)


def _stand_in(result: ir.Value, total: ir.Node) -> None:
    """Let the sum `total` stand wherever `result` did, to which it adds; an output of the graph keeps its name."""
    made, is_output = total.outputs[0], result.is_graph_output()
    ir.convenience.replace_all_uses_with(result, made, replace_graph_outputs=True)
    total.replace_input_with(0, result)
    if is_output:
        name, result.name = result.name, f"{result.name}/own"
        made.name, made.type, made.shape = name, result.type, result.shape


def _name(nodes: Iterable[ir.Node], after: str) -> None:
    """Name nodes and their results after the module's result: TensorRT shows these names, which must be unique."""
    for index, node in enumerate(nodes):
        node.name = f"{after}/lora/{index}"
        node.outputs[0].name = f"{after}/lora/{index}/out"


def _constant(graph: ir.Graph, name: str, values: list[int]) -> ir.Value:
    """Return the graph's initializer with these integers, creating it on first use."""
    name = _CONSTANT + name
    if name not in graph.initializers:
        tensor = ir.tensor(np.array(values, np.int64), name=name)
        graph.register_initializer(ir.Value(name=name, const_value=tensor))
    return graph.initializers[name]
