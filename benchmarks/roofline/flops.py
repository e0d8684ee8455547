"""Count a graph's FLOPs and least bytes moved from its ONNX file alone.

A multiply-add is two FLOPs; convolutions, matrix products and attention are counted. The other operators
(normalization, activations, softmax, resizing) are memory-bound and not counted, as in torch's FlopCounterMode.
The weights are not read: `model.onnx` is enough for a graph of any size.
"""

__all__ = ["Counts", "component_shapes", "count_component", "count_graph", "count_model"]

import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from sdxl_trt.benchmarks.roofline.onnx_shapes import Shape, TypedGraph, infer
from sdxl_trt.engines import CorruptError, IncompatibleError, SizeError, UsageError, explain_os_error
from sdxl_trt.engines.bundle import Bundle, Component

if TYPE_CHECKING:
    import onnx


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """The cost of one call of a graph.

    `weight_bytes` are loaded. `least_bytes` must move even if all intermediate values stay on the chip: the graph's
    inputs and outputs and the weights, and of embedding tables only the rows looked up. `activation_bytes` are the
    operands and results of the counted operators without weights, each counted once: the extra traffic if every
    operator is a separate kernel and nothing stays in a cache. An operand in 8 bits is read as such, and the scores of
    an attention that FP8 splits in two products stay in its kernel, as they do in `Attention`.
    """

    flops: int
    by_operator: dict[str, int]
    weight_bytes: int
    least_bytes: int
    activation_bytes: int


def count_graph(path: Path, shapes: Mapping[str, Shape]) -> Counts:
    """Return the cost of one call of the ONNX file `path` with inputs of these `shapes`, by name.

    Raises CorruptError if the file is not ONNX, UsageError for inputs that the graph does not take, IncompatibleError
    for operators of unknown cost.
    """
    import onnx  # noqa: PLC0415 - takes a while to import

    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as exc:
        raise explain_os_error(exc, f"reading {path}") from exc
    except Exception as exc:  # protobuf's own exceptions, which have no importable type
        raise CorruptError(f"{path}: not an ONNX file ({exc}); run export-engines again") from exc
    return count_model(model, shapes)


def count_model(model: "onnx.ModelProto", shapes: Mapping[str, Shape]) -> Counts:
    """Return the cost of one call of `model`; see `count_graph`."""
    graph = infer(model, shapes)
    flops: Counter[str] = Counter()
    moved = 0
    makers = {name: node for node in graph.nodes for name in node.output}
    scores = {node.input[0] for node in graph.nodes if node.op_type == "Softmax"}
    for node in graph.nodes:
        cost = _cost_of(node)
        if cost is not None and not _constant(node, graph):
            flops[node.op_type] += 2 * cost(node, _shapes_of(node, graph))
            moved += sum(_read(name, graph, makers) for name in node.input if name not in graph.constants)
            moved += sum(_bytes(name, graph) for name in node.output if name not in scores)
    weights = {tensor.name: _bytes(tensor.name, graph) for tensor in model.graph.initializer}
    ends = [value.name for value in (*model.graph.input, *model.graph.output) if value.name not in graph.constants]
    return Counts(
        flops=sum(flops.values()),
        by_operator=dict(sorted(flops.items())),
        weight_bytes=sum(weights.values()),
        least_bytes=sum((weights | _looked_up(graph, weights)).values()) + sum(_bytes(name, graph) for name in ends),
        activation_bytes=moved,
    )


def count_component(bundle: Bundle, component: str, *, rows: int, height: int, width: int, tokens: int = 77) -> Counts:
    """Return the cost of one call of a bundle's component for pictures of `height` × `width` pixels.

    `rows` are a UNet's rows (pictures × 2 with guidance), an autoencoder's pictures, or an encoder's prompts. Raises
    UsageError for a component that the bundle lacks, and as `count_graph`.
    """
    found = bundle.manifest.components.get(component)
    if found is None:
        raise UsageError(f"{bundle.root}: has no {component}; it has {', '.join(bundle.manifest.components)}")
    factor = bundle.manifest.base.vae.factor
    shapes = component_shapes(found, factor, rows=rows, height=height, width=width, tokens=tokens)
    return count_graph(bundle.path(found.graph), shapes)


def component_shapes(
    component: Component, factor: int, *, rows: int, height: int, width: int, tokens: int = 77
) -> dict[str, Shape]:
    """Return the shape of every input of a component; `height`, `width` in pixels, `factor` per latent pixel."""
    if height % factor or width % factor:
        raise SizeError(f"{width}x{height}: a latent pixel spans {factor} pixels; give multiples of {factor}")
    unit = 1 if component.kind == "vae_encoder" else factor
    axes = {"rows": rows, "prompts": rows, "vectors": 1, "pictures": rows, "tokens": tokens}
    axes |= {"height": height // unit, "width": width // unit}
    return {spec.name: tuple(_size(axis, axes) for axis in spec.shape) for spec in component.inputs}


def _size(axis: int | str, axes: Mapping[str, int]) -> int:
    if isinstance(axis, int):
        return axis
    if axis not in axes:
        raise UsageError(f"the graph has an unknown axis {axis!r}; export it again")
    return axes[axis]


def _attributes(node: "onnx.NodeProto") -> dict[str, Any]:
    import onnx  # noqa: PLC0415

    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


# Each returns the multiply-adds of a node from the shapes of its inputs followed by that of its first output.
def _conv(_: "onnx.NodeProto", shapes: list[Shape]) -> int:
    return math.prod(shapes[-1]) * math.prod(shapes[1][1:])


def _conv_transpose(_: "onnx.NodeProto", shapes: list[Shape]) -> int:
    return math.prod(shapes[0]) * math.prod(shapes[1][1:])


def _matmul(_: "onnx.NodeProto", shapes: list[Shape]) -> int:
    return math.prod(shapes[-1]) * shapes[0][-1]


def _gemm(node: "onnx.NodeProto", shapes: list[Shape]) -> int:
    return math.prod(shapes[-1]) * shapes[0][0 if _attributes(node).get("transA") else 1]


def _attention(node: "onnx.NodeProto", shapes: list[Shape]) -> int:
    if any(node.input[4:]) or len(node.output) > 1:
        raise IncompatibleError(f"Attention {node.name}: has a key/value cache, whose cost is not counted")
    query, keys, values = shapes[0], shapes[1], shapes[2]
    if len(query) == 4:
        batch, heads, length, wide = query
        return batch * heads * length * keys[2] * (wide + values[3])
    groups = _attributes(node)
    batch, length, wide = query
    # Grouped-query attention: every query head gathers values as wide as its group's.
    gathered = values[2] * groups["q_num_heads"] // groups["kv_num_heads"]
    return int(batch * length * keys[1] * (wide + gathered))


_COSTS: dict[str, Callable[["onnx.NodeProto", list[Shape]], int]] = {
    "Attention": _attention,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
}
# Operators with multiply-adds that are not counted here: ignoring them would undercount the graph.
_UNKNOWN = {"ConvInteger", "DFT", "DeformConv", "Einsum", "GRU", "If", "LSTM", "Loop", "MatMulInteger", "QLinearConv",
            "QLinearMatMul", "RNN", "STFT", "Scan", "TensorScatter"}  # fmt: skip


def _cost_of(node: "onnx.NodeProto") -> Callable[["onnx.NodeProto", list[Shape]], int] | None:
    if node.domain not in ("", "ai.onnx") or node.op_type in _UNKNOWN:
        raise IncompatibleError(f"{node.op_type} {node.name}: its cost is not counted; count the graph as"
                                " export-engines writes it")  # fmt: skip
    return _COSTS.get(node.op_type)


def _constant(node: "onnx.NodeProto", graph: TypedGraph) -> bool:
    """Whether a node is constant-folded when the graph is loaded."""
    return node.output[0] in graph.constants


def _shapes_of(node: "onnx.NodeProto", graph: TypedGraph) -> list[Shape]:
    names = [*(name for name in node.input if name), node.output[0]]
    unknown = [name for name in names if name not in graph.shapes]
    if unknown:
        raise IncompatibleError(f"{node.op_type} {node.name}: the shape of {unknown[0]} depends on more than the sizes"
                                " of the inputs")  # fmt: skip
    return [graph.shapes[name] for name in names]


def _looked_up(graph: TypedGraph, weights: Mapping[str, int]) -> dict[str, int]:
    """Return the bytes that a call reads of each embedding table: a weight used only by one Gather."""
    uses = Counter(name for node in graph.nodes for name in node.input)
    gathers = [node for node in graph.nodes if node.op_type == "Gather" and uses[node.input[0]] == 1]
    tables = [node for node in gathers if node.input[0] in weights and node.output[0] in graph.shapes]
    return {node.input[0]: min(weights[node.input[0]], _bytes(node.output[0], graph)) for node in tables}


def _read(name: str, graph: TypedGraph, makers: "Mapping[str, onnx.NodeProto]") -> int:
    """Return the bytes of an operand: of the 8-bit numbers, if it was dequantized; 0 for what a softmax made."""
    made = makers.get(name)
    if made is not None and made.op_type == "DequantizeLinear":
        name, made = made.input[0], makers.get(made.input[0])
    size = _bytes(name, graph)
    if made is not None and made.op_type == "QuantizeLinear":
        made = makers.get(made.input[0])
    return 0 if made is not None and made.op_type == "Softmax" else size


def _bytes(name: str, graph: TypedGraph) -> int:
    return math.prod(graph.shapes[name]) * graph.items[name] if name else 0
