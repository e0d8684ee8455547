"""The 8-bit layers of a graph as they are stored: what their weights and quantizers stand for, as numbers."""

__all__ = ["Quantizer", "StoredLayer", "stored_layers"]

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sdxl_trt.engines import CorruptError
from sdxl_trt.engines.bundle import WEIGHT

Numbers = NDArray[np.float64]
_FUSED = "MatMulIntegerToFloat"
# The smallest and the largest number of each 8-bit type, before its scale.
_ENDS = {ir.DataType.INT8: (-127, 127), ir.DataType.UINT8: (0, 255), ir.DataType.FLOAT8E4M3FN: (-448, 448)}


@dataclass(frozen=True)
class Quantizer:
    """What the numbers of a value are rounded to: the smallest and the largest, and the step between two."""

    low: float
    high: float
    step: float


@dataclass(frozen=True)
class StoredLayer:
    """A linear layer or convolution in 8 bits; `half` is that of a weight which two nodes share.

    `source` is what its input is rounded to, and `result` its output, if it is.
    """

    module: str
    node: ir.Node
    axis: int
    half: int | None
    source: Quantizer
    result: Quantizer | None
    _weight: ir.Value
    _scale: ir.Value
    _zero: ir.Value | None
    _folder: Path

    def weight(self) -> tuple[Numbers, Numbers]:
        """Return the weight as numbers, whole and in its stored axes, and the scale of each of this node's channels."""
        bits, scale = _array(self._weight, self._folder), _array(self._scale, self._folder)
        zero = np.zeros_like(scale) if self._zero is None else _array(self._zero, self._folder)
        if self.half is not None:
            bits = np.split(bits, 2, axis=self.axis)[self.half]
        shape = [1] * bits.ndim
        shape[self.axis] = -1
        return (bits - zero.reshape(shape)) * scale.reshape(shape), scale

    def bias(self) -> tuple[Numbers, Numbers] | None:
        """Return the bias as numbers with its scale, if it is an integer."""
        made = self.node.inputs[2].producer() if len(self.node.inputs) > 2 and self.node.inputs[2] is not None else None
        if self.node.op_type != "Conv" or made is None or made.op_type != "DequantizeLinear":
            return None
        bits, scale = (_array(_given(made, place), self._folder) for place in (0, 1))
        return bits * scale, scale


def stored_layers(model: ir.Model, folder: Path) -> Iterator[StoredLayer]:
    """Yield the 8-bit layers of `model`, whose weights lie in `folder`.

    Raises CorruptError if a value is quantized with one scale and dequantized with another.
    """
    for node in model.graph:
        if node.op_type == _FUSED:
            weight, scale, zero = _given(node, 1), _given(node, 3), None
            source = _quantizer(_given(node, 0), _given(node, 2), _given(node, 4), folder)
            axis = 1
        else:
            wide = node.inputs[1].producer() if len(node.inputs) > 1 and node.inputs[1] is not None else None
            if node.op_type not in ("MatMul", "Gemm", "Conv") or wide is None or wide.op_type != "DequantizeLinear":
                continue
            weight, scale, zero = (_given(wide, place) for place in range(3))
            axis = wide.attributes.get_int("axis", 1) or 0
            narrow = _given(node, 0).producer()
            if narrow is None or narrow.op_type != "DequantizeLinear":
                continue
            source = _quantizer(_given(narrow, 0), _given(narrow, 1), _given(narrow, 2), folder)
        split, half = weight.producer(), None
        if split is not None:
            half, weight = split.outputs.index(weight), _given(split, 0)
        name = str(weight.name)
        if name.endswith(WEIGHT):
            yield StoredLayer(name.removesuffix(WEIGHT), node, axis, half, source, _result(node, folder), weight, scale,
                              zero, folder)  # fmt: skip


def _result(node: ir.Node, folder: Path) -> Quantizer | None:
    """Return what a convolution's result is rounded to, if all its users read it so."""
    users = [user for user, _ in node.outputs[0].uses()]
    if node.op_type != "Conv" or len(users) != 1 or users[0].op_type != "QuantizeLinear":
        return None
    return _quantizer(users[0].outputs[0], _given(users[0], 1), _given(users[0], 2), folder)


def _quantizer(narrow: ir.Value, scale: ir.Value, zero: ir.Value, folder: Path) -> Quantizer:
    """Return what `narrow` stands for if it is read with this scale and zero point."""
    made = narrow.producer()
    while made is not None and made.op_type == "Resize":
        made = _given(made, 0).producer()
    if made is None or made.op_type != "QuantizeLinear":
        raise CorruptError(f"{narrow.name}: is read in 8 bits, but not quantized")
    step, offset = float(_array(scale, folder)), float(_array(zero, folder))
    written = [float(_array(_given(made, place), folder)) for place in (1, 2)]
    if written != [step, offset]:
        raise CorruptError(f"{narrow.name}: is quantized with a scale and zero point of {written[0]:g} and"
                           f" {written[1]:g}, and read with {step:g} and {offset:g}")  # fmt: skip
    low, high = _ENDS[ir.DataType(zero.const_value.dtype)] if zero.const_value is not None else (0, 0)
    return Quantizer((low - offset) * step, (high - offset) * step, step)


def _array(value: ir.Value, folder: Path) -> Numbers:
    """Return a stored tensor; of a file only this tensor is read."""
    tensor = value.const_value
    if tensor is None:
        raise CorruptError(f"{value.name}: is not stored in the graph")
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.numpy().astype(np.float64)
    dtype, count = tensor.dtype.numpy(), int(np.prod(tensor.shape.numpy(), dtype=np.int64))
    data = np.fromfile(folder / Path(tensor.location).name, dtype, count, offset=tensor.offset or 0)
    return data.reshape(tensor.shape.numpy()).astype(np.float64)


def _given(node: ir.Node, place: int) -> ir.Value:
    value = node.inputs[place] if place < len(node.inputs) else None
    if value is None:
        raise CorruptError(f"{node.name}: its input {place} is missing")
    return value
