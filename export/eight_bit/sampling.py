"""Small samples of what layers read while the model runs, and each layer's own error on them.

A step of SDXL has some 800 layers. Running it once per layer would take hours, so a layer is judged by itself: its
output on the sample with its weights and input in 8 bits, against its output in floating point.
"""

__all__ = ["LayerError", "add_sample_outputs", "layer_error", "worst_first"]

from collections.abc import Iterable, Sequence

import msgspec
import numpy as np
import onnx_ir as ir
import torch

from sdxl_trt.engines import Array
from sdxl_trt.export.eight_bit.formats import FORMATS, Scheme, activation_scale, quantize_weight, unsigned_scale
from sdxl_trt.export.eight_bit.layers import Layer

ROWS = 64
"""Rows of a linear layer's input that a sample has, evenly spread."""
SIDE = 10
"""Side of the square of a convolution's input that a sample has, from the middle of the first picture."""
_EXACT_DB = 200.0


class LayerError(msgspec.Struct, frozen=True, kw_only=True):
    """A layer's own error in 8 bits: the ratio of its output's power to the error's, in dB.

    `excluded` is why the layer stays in floating point, "" if it does not. `low` and `high` are its input's range.
    """

    module: str
    kind: str
    snr_db: float
    low: float
    high: float
    parameters: int
    excluded: str = ""


def add_sample_outputs(model: ir.Model, layers: Iterable[Layer]) -> dict[str, str]:
    """Add a sample of each layer's input to the outputs of `model`, in place; return {module: output}."""
    graph, names, known = model.graph, dict[str, str](), dict[tuple[ir.Value, str], str]()
    numbers = _Numbers(graph)
    for layer in layers:
        key = (layer.source, layer.kind)
        if key not in known:
            known[key] = f"sample.{layer.module}"
            made = _rows(layer, numbers) if layer.kind == "linear" else _square(layer.source, numbers)
            for index, node in enumerate(made):
                node.name = f"{known[key]}.{index}"
                node.outputs[0].name = node.name
            graph.extend(made)
            result = made[-1].outputs[0]
            result.name = known[key]
            result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None] * _axes(layer))
            graph.outputs.append(result)
        names[layer.module] = known[key]
    return names


def layer_error(
    layer: Layer, sample: Array, weight: torch.Tensor, span: tuple[float, float], scheme: Scheme, excluded: str = ""
) -> LayerError:
    """Return a layer's error on a sample of its input; `weight` has its stored axes, `span` is its input's range."""
    source = torch.from_numpy(np.array(sample, np.float32))
    narrow, scales = quantize_weight(weight, layer.axis, scheme)
    shape = [1] * weight.dim()
    shape[layer.axis] = -1
    restored = narrow.float() * torch.from_numpy(scales).reshape(shape)
    exact = _apply(layer, source, weight.float())
    error = _apply(layer, _through(source, span, scheme), restored) - exact
    power, noise = float(exact.square().sum()), float(error.square().sum())
    ratio = _EXACT_DB if noise == 0 else 10 * np.log10(max(power, np.finfo(np.float64).tiny) / noise)
    return LayerError(module=layer.module, kind=layer.kind, snr_db=round(float(ratio), 2), low=span[0], high=span[1],
                      parameters=weight.numel(), excluded=excluded)  # fmt: skip


def _apply(layer: Layer, source: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if layer.kind == "convolution":
        strides, pads = (list(layer.node.attributes.get_ints(name) or ()) for name in ("strides", "pads"))
        return torch.nn.functional.conv2d(source, weight, stride=strides or 1, padding=pads[:2] or 0)
    return source @ (weight if layer.axis == 1 else weight.T)


def _through(source: torch.Tensor, span: tuple[float, float], scheme: Scheme) -> torch.Tensor:
    """Return numbers as the layer sees them in 8 bits: int8's with a zero point, as on a CPU."""
    if scheme == "fp8":
        scale = float(activation_scale(span, scheme))
        largest = FORMATS[scheme].largest
        return (source / scale).clamp(-largest, largest).to(FORMATS[scheme].torch).float() * scale
    step, zero = unsigned_scale(span)
    return ((source / float(step)).round() + zero).clamp(0, 255).sub(zero) * float(step)


class _Numbers:
    """Integer constants of a graph, each stored once."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph

    def __call__(self, *values: int) -> ir.Value:
        name = "sample.numbers." + "_".join(map(str, values[:4])) + f".{len(values)}"
        if name not in self._graph.initializers:
            tensor = ir.tensor(np.array(values, np.int64), name=name)
            self._graph.register_initializer(ir.Value(name=name, const_value=tensor))
        return self._graph.initializers[name]


def _rows(layer: Layer, numbers: _Numbers) -> list[ir.Node]:
    """Return nodes that select ROWS rows of a linear layer's input."""
    if layer.weight.shape is None:
        raise RuntimeError(f"{layer.module}: the weight has no shape")
    width = int(layer.weight.shape.numpy()[1 - layer.axis])
    flat = ir.node("Reshape", [layer.source, numbers(-1, width)])
    count = ir.node("Shape", [flat.outputs[0]], {"start": 0, "end": 1})
    spread = ir.node("Mul", [count.outputs[0], numbers(*range(ROWS))])
    places = ir.node("Div", [spread.outputs[0], numbers(ROWS)])
    return [flat, count, spread, places, ir.node("Gather", [flat.outputs[0], places.outputs[0]])]


def _square(source: ir.Value, numbers: _Numbers) -> list[ir.Node]:
    """Return nodes that cut a square out of the middle of the first picture of a convolution's input."""
    sides = ir.node("Shape", [source], {"start": 2, "end": 4})
    middle = ir.node("Div", [sides.outputs[0], numbers(2)])
    moved = ir.node("Sub", [middle.outputs[0], numbers(SIDE // 2)])
    start = ir.node("Max", [moved.outputs[0], numbers(0)])
    end = ir.node("Add", [start.outputs[0], numbers(SIDE)])
    first = ir.node("Slice", [source, numbers(0), numbers(1), numbers(0)])
    cut = ir.node("Slice", [first.outputs[0], start.outputs[0], end.outputs[0], numbers(2, 3)])
    return [sides, middle, moved, start, end, first, cut]


def _axes(layer: Layer) -> int:
    return 2 if layer.kind == "linear" else 4


def worst_first(errors: Sequence[LayerError]) -> list[LayerError]:
    """Return the errors in the order in which to exclude their layers."""
    return sorted(errors, key=lambda each: each.snr_db)
