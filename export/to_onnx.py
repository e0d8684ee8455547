"""A meta-device module to an ONNX graph whose weights are names still to be filled."""

__all__ = ["trace"]

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import onnx_ir as ir
import torch
from torch.export import Dim

from sdxl_trt.export.graphs import Axis, Graph, Input

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def trace(graph: Graph, precision: str, opset: int) -> ir.Model:
    """Trace `graph` on the meta device and convert it; initializers have types and shapes, and no values.

    The module is converted to `precision` in place. Nothing of the size of the weights is allocated.
    """
    dtype = _DTYPES[precision]
    graph.module.to(dtype)
    arguments = tuple(_example(value, dtype) for value in graph.inputs)
    with _quiet():
        program = torch.export.export(graph.module, arguments, dynamic_shapes=_dynamic_shapes(graph.inputs))
        converted = torch.onnx.export(
            program,
            dynamo=True,
            optimize=False,
            opset_version=opset,
            verbose=False,
            input_names=[value.name for value in graph.inputs],
            output_names=[value.name for value in graph.outputs],
        )
    if converted is None:  # the signature allows it for the other exporter; this one always returns a program
        raise RuntimeError("torch.onnx.export returned nothing")
    model = converted.model
    for value in model.graph.initializers.values():
        value.const_value = None
    _name_axes(model, graph)
    return model


def _example(value: Input, dtype: torch.dtype) -> torch.Tensor:
    shape = [axis.example if isinstance(axis, Axis) else axis for axis in value.shape]
    return torch.empty(shape, dtype=value.dtype or dtype, device="meta")


def _dynamic_shapes(inputs: tuple[Input, ...]) -> tuple[dict[int, Dim], ...]:
    dims: dict[str, Dim] = {}
    for axis in (axis for value in inputs for axis in value.shape if isinstance(axis, Axis)):
        root = Dim(axis.name) if axis.traced_max is None else Dim(axis.name, max=axis.traced_max)
        dims.setdefault(axis.name, root if axis.multiple == 1 else axis.multiple * root)
    return tuple(
        {i: dims[axis.name] for i, axis in enumerate(value.shape) if isinstance(axis, Axis)} for value in inputs
    )


def _name_axes(model: ir.Model, graph: Graph) -> None:
    """Give inputs and outputs the signature's axis names instead of torch's symbols."""
    for value, spec in zip(model.graph.inputs, graph.inputs, strict=True):
        value.shape = ir.Shape([axis.name if isinstance(axis, Axis) else axis for axis in spec.shape])
    for value, output in zip(model.graph.outputs, graph.outputs, strict=True):
        value.shape = ir.Shape(list(output.shape))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's own progress, its notes on torchvision and its deprecation warnings."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
