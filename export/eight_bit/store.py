"""Streams a component's weights into a new file, those of chosen layers in 8 bits with their scales behind them."""

__all__ = ["EightBitWeights", "Stored", "read_stored", "write_eight_bit"]

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from sdxl_trt.engines import explain_os_error
from sdxl_trt.engines.bundle import WEIGHT, AdapterTable, TensorRecord
from sdxl_trt.export.eight_bit.formats import FORMATS, Scheme, quantize_weight, unsigned_scale
from sdxl_trt.export.eight_bit.layers import Layer
from sdxl_trt.export.eight_bit.ranges import INPUT, Ranges
from sdxl_trt.export.graph import WEIGHTS_FILE, WeightsWriter, WrittenWeights

DTypeName = Literal["float32", "float16", "bfloat16", "int8", "float8e4m3fn"]
BIAS = ".bias"
_TORCH: dict[str, torch.dtype] = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
}  # fmt: skip
_ONNX: dict[str, ir.DataType] = {
    "float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16,
}  # fmt: skip
_NAMES: dict[Scheme, DTypeName] = {"int8": "int8", "fp8": "float8e4m3fn"}


@dataclass(frozen=True)
class Stored:
    """A tensor of the weights file."""

    offset: int
    dtype: ir.DataType
    shape: tuple[int, ...]

    def part(self, half: int) -> "Stored":
        """Return the first or the second half of a vector."""
        (length,) = self.shape
        size = length // 2
        return Stored(self.offset + int(half * size * self.dtype.itemsize), self.dtype, (size,))

    def value(self, name: str, folder: Path) -> ir.Value:
        """Return an initializer that refers to the tensor."""
        return ir.Value(name=name, type=ir.TensorType(self.dtype), shape=ir.Shape(self.shape),
                        const_value=self.tensor(name, folder))  # fmt: skip

    def tensor(self, name: str, folder: Path) -> ir.ExternalTensor:
        """Return the tensor as ONNX refers to it."""
        length = int(math.prod(self.shape) * self.dtype.itemsize)
        return ir.ExternalTensor(
            WEIGHTS_FILE, self.offset, length, self.dtype, shape=ir.Shape(self.shape), name=name, base_dir=folder
        )


@dataclass
class EightBitWeights:
    """What was written: the file, its tensors by name, and the scales of the chosen layers by module.

    `scales` are stored in the graph's own floating-point type, `wide_scales` in fp32. Convolutions also have their bias
    as int32, with its scale.
    """

    written: WrittenWeights
    tensors: dict[str, Stored] = field(default_factory=dict)
    scales: dict[str, Stored] = field(default_factory=dict)
    wide_scales: dict[str, Stored] = field(default_factory=dict)
    biases: dict[str, tuple[Stored, Stored]] = field(default_factory=dict)


def write_eight_bit(
    table: AdapterTable,
    source: Path,
    folder: Path,
    layers: Mapping[str, Layer],
    ranges: Ranges,
    scheme: Scheme,
    progress: Callable[[int], None] | None = None,
) -> EightBitWeights:
    """Write ``folder/weights.data`` from ``source/weights.data``, whose tensors `table` lists.

    The weights of `layers`, by module, are quantized. One tensor is in memory at a time, and the scales.
    """
    records = sorted((record for record in table.tensors if record.offset is not None), key=_offset)
    found = EightBitWeights(WrittenWeights(0, "", 0, ()))
    by_name = table.by_name
    scales: dict[str, NDArray[np.float32]] = {}
    biases: dict[str, tuple[NDArray[np.int32], NDArray[np.float32]]] = {}
    tensors: list[TensorRecord] = []
    try:
        with (folder / WEIGHTS_FILE).open("wb") as file:
            writer = WeightsWriter(file)
            for record in records:
                stored, dtype = read_stored(source, record), _ONNX[record.dtype]
                layer = layers.get(record.name.removesuffix(WEIGHT)) if record.name.endswith(WEIGHT) else None
                name: DTypeName = record.dtype
                if layer is not None:
                    module = layer.module
                    near, _ = unsigned_scale(ranges.of(module + INPUT))
                    bias = _bias(source, by_name.get(module + BIAS)) if layer.kind == "convolution" else None
                    stored, scales[module] = quantize_weight(stored, layer.axis, scheme, bias, float(near))
                    if bias is not None and scheme == "int8":
                        step = scales[module].astype(np.float64) * float(near)
                        biases[module] = (np.round(bias / step).astype(np.int32), step.astype(np.float32))
                    dtype, name = FORMATS[scheme].onnx, _NAMES[scheme]
                offset = writer.append(stored)
                found.tensors[record.name] = Stored(offset, dtype, record.stored_shape)
                tensors.append(
                    TensorRecord(name=record.name, shape=record.shape, dtype=name, permutation=record.permutation,
                                 offset=offset)
                )  # fmt: skip
                if progress:
                    progress(stored.nbytes)
            parameters = writer.parameters
            _write_scales(writer, found, scales, biases, half=any(each.dtype == "float16" for each in records))
            found.written = WrittenWeights(writer.position, writer.digest.hexdigest(), parameters, tuple(tensors))
    except OSError as exc:
        raise explain_os_error(exc, f"writing {folder / WEIGHTS_FILE}") from exc
    return found


def _write_scales(
    writer: WeightsWriter,
    found: EightBitWeights,
    scales: Mapping[str, NDArray[np.float32]],
    biases: Mapping[str, tuple[NDArray[np.int32], NDArray[np.float32]]],
    *,
    half: bool,
) -> None:
    """Write the scales, which are vectors, and the biases in int32."""
    for module, scale in scales.items():
        found.wide_scales[module] = _append(writer, scale)
        found.scales[module] = _append(writer, scale.astype(np.float16)) if half else found.wide_scales[module]
    for module, (bias, step) in biases.items():
        found.biases[module] = (_append(writer, bias), _append(writer, step))


def _append(writer: WeightsWriter, values: NDArray[np.float32] | NDArray[np.float16] | NDArray[np.int32]) -> Stored:
    return Stored(writer.append(torch.from_numpy(values)), ir.DataType.from_numpy(values.dtype), values.shape)


def read_stored(folder: Path, record: TensorRecord) -> torch.Tensor:
    """Return a stored tensor in its stored shape, in memory of its own."""
    data = np.fromfile(folder / WEIGHTS_FILE, np.uint8, record.nbytes, offset=_offset(record))
    return torch.from_numpy(data).view(_TORCH[record.dtype]).reshape(record.stored_shape)


def _bias(folder: Path, record: TensorRecord | None) -> NDArray[np.float32] | None:
    return None if record is None or record.offset is None else read_stored(folder, record).float().numpy()


def _offset(record: TensorRecord) -> int:
    return record.offset or 0
