"""Trace a module on the meta device to an ONNX graph whose weights have names but no values yet."""

__all__ = ["trace_graph"]

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from torch.export import Dim

from sdxl_trt.export.graph.blocks import Blocks, expand, hollowed, translations
from sdxl_trt.export.graph.passes import fold
from sdxl_trt.export.graph.precision import Casting, boundary_dtype, convert_module
from sdxl_trt.export.graph.signatures import Axis, Graph, Input

_CASTING = "inner."


def trace_graph(graph: Graph, precision: str, opset: int) -> ir.Model:
    """Return the ONNX model of `graph`, traced on the meta device; initializers have types and shapes, but no values.

    The module is converted to `precision` in place. No memory for weights is allocated.
    """
    inside, outside = convert_module(graph, precision), boundary_dtype(precision)
    arguments = tuple(_example(value, outside) for value in graph.inputs)
    shapes: Any = _dynamic_shapes(graph.inputs)
    module = graph.module
    if inside != outside:
        module, shapes = Casting(graph, inside, outside), (shapes,)
    with _quiet():
        model = _convert(module, arguments, shapes, opset)
    _rename(model, graph)
    return model


def _convert(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...], shapes: Any, opset: int) -> ir.Model:
    """Convert a module; repeated blocks are converted once per kind of block and call."""
    with hollowed(module) as calls:
        program = torch.export.export(module, arguments, dynamic_shapes=shapes)
        converted = torch.onnx.export(
            program, dynamo=True, optimize=False, opset_version=opset, verbose=False,
            custom_translation_table=translations(),
        )  # fmt: skip
    if converted is None:  # only the old exporter returns None; the dynamo one always returns a program
        raise RuntimeError("torch.onnx.export returned nothing")
    model = converted.model
    for value in model.graph.initializers.values():
        value.const_value = None
    if calls:
        keys = {path: call.key() for path, call in calls.items()}
        distinct = dict(zip(keys.values(), calls.values(), strict=True))
        blocks = Blocks(list(distinct.values()))
        inner = _convert(blocks, blocks.arguments(), blocks.dynamic_shapes(), opset)
        fold(inner)  # once per block instead of once per copy
        templates = dict(zip(distinct, blocks.templates(inner), strict=True))
        expand(model, {path: templates[key] for path, key in keys.items()})
    return model


def _example(value: Input, dtype: torch.dtype) -> torch.Tensor:
    shape = [axis.example if isinstance(axis, Axis) else axis for axis in value.shape]
    return torch.empty(shape, dtype=value.dtype or dtype, device="meta")


def _dynamic_shapes(inputs: tuple[Input, ...]) -> tuple[dict[int, Dim], ...]:
    roots: dict[str, Dim] = {}
    for axis in (axis for value in inputs for axis in value.shape if isinstance(axis, Axis)):
        roots.setdefault(axis.name, Dim(axis.name) if axis.traced_max is None else Dim(axis.name, max=axis.traced_max))

    def of(axis: Axis) -> Any:
        return roots[axis.name] if axis.multiple == 1 else axis.multiple * roots[axis.name]

    return tuple({i: of(axis) for i, axis in enumerate(value.shape) if isinstance(axis, Axis)} for value in inputs)


def _rename(model: ir.Model, graph: Graph) -> None:
    """Rename inputs, outputs and axes from torch's names to the signature's, weights to the module's."""
    for name in [name for name in model.graph.initializers if name.startswith(_CASTING)]:
        value = model.graph.initializers.pop(name)
        value.name = name.removeprefix(_CASTING)
        model.graph.initializers.add(value)
    for value, spec in zip(model.graph.inputs, graph.inputs, strict=True):
        value.name = spec.name
        value.shape = ir.Shape([axis.label or axis.name if isinstance(axis, Axis) else axis for axis in spec.shape])
    for value, output in zip(model.graph.outputs, graph.outputs, strict=True):
        value.name = output.name
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
