"""Infer the shape of every value of an ONNX graph for given input shapes, without reading the weights.

onnx's own inference loses the shapes after a Reshape whose target the graph computes from another shape. Here nodes
are inferred one at a time, and small tensors such as shapes and indices are evaluated, as an engine does.
"""

__all__ = ["TypedGraph", "infer"]

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from sdxl_trt.engines import IncompatibleError, UsageError

if TYPE_CHECKING:
    import onnx

Shape = tuple[int, ...]
# Elements: tensors that determine a shape (sizes, indices) are not larger.
_SMALL = 64
# Operators for which onnx infers only the type: their output has the shape of their first input.
_ALIKE = {"GroupNormalization"}


class TypedGraph(NamedTuple):
    """A graph's nodes in order, and what is known about its values, by name.

    `shapes` has no entry for a value with a data-dependent shape; `constants` are initializers and values computed
    only from them; `items` are bytes per element.
    """

    nodes: "list[onnx.NodeProto]"
    shapes: dict[str, Shape]
    items: dict[str, int]
    constants: set[str]


def infer(model: "onnx.ModelProto", inputs: Mapping[str, Shape]) -> TypedGraph:
    """Return the shapes of all values of `model` for inputs of the shapes `inputs`.

    Raises UsageError for inputs that the graph does not take, IncompatibleError for a node that cannot be inferred.
    """
    return _Inference(model, inputs).run()


class _Inference:
    """The state of one pass over a graph: types by name, and the values of small known tensors."""

    def __init__(self, model: "onnx.ModelProto", inputs: Mapping[str, Shape]) -> None:
        self.model = model
        self.opsets = {opset.domain: opset.version for opset in model.opset_import}
        self.types: dict[str, onnx.TypeProto] = {}
        self.values: dict[str, onnx.TensorProto] = {}
        self.constants: set[str] = set()
        self._take_initializers()
        self._take_inputs(inputs)

    def run(self) -> TypedGraph:
        for node in self.model.graph.node:
            self._infer(node)
            if node.input and all(name in self.constants for name in node.input if name):
                self.constants.update(node.output)
            self._evaluate(node)
        shapes = {name: shape for name in self.types if (shape := self._shape(name)) is not None}
        items = {name: _item(kind.tensor_type.elem_type) for name, kind in self.types.items()}
        return TypedGraph(list(self.model.graph.node), shapes, items, self.constants)

    def _take_initializers(self) -> None:
        import onnx  # noqa: PLC0415 - takes a while to import

        for tensor in self.model.graph.initializer:
            self.types[tensor.name] = onnx.helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims))
            self.constants.add(tensor.name)
            if tensor.data_location != onnx.TensorProto.EXTERNAL and math.prod(tensor.dims) <= _SMALL:
                self.values[tensor.name] = tensor

    def _take_inputs(self, inputs: Mapping[str, Shape]) -> None:
        import onnx  # noqa: PLC0415

        wanted = [value for value in self.model.graph.input if value.name not in self.constants]
        for value in wanted:
            shape = inputs.get(value.name)
            dims = value.type.tensor_type.shape.dim
            fixed = [dim.dim_value if dim.HasField("dim_value") else None for dim in dims]
            fits = shape is not None and len(shape) == len(fixed)
            if not fits or any(size not in (None, given) for size, given in zip(fixed, shape or (), strict=True)):
                expected = [dim.dim_value or dim.dim_param or "?" for dim in dims]
                raise UsageError(f"input {value.name}: given {shape}, but the graph takes {expected}")
            self.types[value.name] = onnx.helper.make_tensor_type_proto(value.type.tensor_type.elem_type, shape)
        unknown = sorted(set(inputs) - {value.name for value in wanted})
        if unknown:
            raise UsageError(f"the graph has no input {unknown[0]}; it takes {', '.join(v.name for v in wanted)}")

    def _infer(self, node: "onnx.NodeProto") -> None:
        import onnx  # noqa: PLC0415
        from onnx.shape_inference import InferenceError, infer_node_outputs  # noqa: PLC0415

        used = [name for name in node.input if name]
        try:
            schema = onnx.defs.get_schema(node.op_type, self.opsets.get(node.domain, 1), node.domain)
            found = infer_node_outputs(
                schema,
                node,
                {name: self.types[name] for name in used},
                {name: self.values[name] for name in used if name in self.values},
                opset_imports=list(self.model.opset_import),
                ir_version=self.model.ir_version,
            )
        except (onnx.defs.SchemaError, InferenceError, KeyError) as exc:
            raise IncompatibleError(
                f"{node.op_type} {node.name}: its shape cannot be inferred ({' '.join(str(exc).split())}); count the"
                " graph as export-engines writes it, at sizes that it takes"
            ) from exc
        self.types.update(found)
        if node.op_type in _ALIKE:
            self.types[node.output[0]] = self.types[node.input[0]]

    def _evaluate(self, node: "onnx.NodeProto") -> None:
        """Evaluate the outputs of a node if they follow from small known tensors or from shapes."""
        if node.op_type == "Shape":
            self._note_shape(node)
            return
        known = node.op_type == "Constant" or (node.input and all(n in self.values for n in node.input if n))
        shapes = [self._shape(name) for name in node.output]
        if not known or any(shape is None or math.prod(shape) > _SMALL for shape in shapes):
            return
        from onnx import numpy_helper  # noqa: PLC0415
        from onnx.reference import ReferenceEvaluator  # noqa: PLC0415

        feeds = {name: numpy_helper.to_array(self.values[name]) for name in node.input if name}
        results: Any = ReferenceEvaluator(node, opsets=self.opsets).run(None, feeds)
        for name, result in zip(node.output, results, strict=True):
            self.values[name] = numpy_helper.from_array(result, name)

    def _note_shape(self, node: "onnx.NodeProto") -> None:
        import numpy as np  # noqa: PLC0415
        from onnx import numpy_helper  # noqa: PLC0415

        shape = self._shape(node.input[0])
        if shape is not None:
            ends = {attribute.name: attribute.i for attribute in node.attribute}
            part = shape[ends.get("start", 0) : ends.get("end", len(shape))]
            self.values[node.output[0]] = numpy_helper.from_array(np.array(part, np.int64), node.output[0])

    def _shape(self, name: str) -> Shape | None:
        kind = self.types.get(name)
        if kind is None or not kind.tensor_type.HasField("shape"):
            return None
        dims = kind.tensor_type.shape.dim
        return tuple(d.dim_value for d in dims) if all(d.HasField("dim_value") for d in dims) else None


def _item(elem_type: int) -> int:
    """Return the bytes per element of an ONNX type, or 0 if it has no fixed size."""
    import onnx  # noqa: PLC0415

    if elem_type in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING):
        return 0
    return int(onnx.helper.tensor_dtype_to_np_dtype(elem_type).itemsize)
