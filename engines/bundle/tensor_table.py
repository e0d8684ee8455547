"""``adapters.json``: where each tensor of a component lies in its weights file, and which modules have slots.

Tensors and modules have their published names. A slot is a pair of inputs through which a module of ``adapters.onnx``
takes LoRAs: see `export.graph.slots`.
"""

__all__ = ["ADAPTERS_FILE", "DOWN", "RANK", "UP", "WEIGHT", "AdapterTable", "Slot", "TensorRecord", "is_slot_input",
           "read_table"]  # fmt: skip

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from sdxl_trt.engines.bundle.bundle import Bundle
from sdxl_trt.engines.bundle.digests import verify_file
from sdxl_trt.engines.bundle.manifest import EIGHT_BIT, DType, Precision
from sdxl_trt.engines.bundle.records import Natural, Positive, Record
from sdxl_trt.engines.errors import CorruptError, IncompatibleError, explain_os_error

ADAPTERS_FILE = "adapters.json"
WEIGHT, DOWN, UP = ".weight", ".lora_down", ".lora_up"
"""What follows a module's name in those of its weight and of its slot's inputs."""
RANK = "rank"
"""The axis that all slots of a graph share: the sum of the ranks of a request's LoRAs."""
_MOST_BYTES = 16 << 20
_MOST_TENSORS = 100_000
_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "float8e4m3fn": 1}
_REMEDY = "run export-engines again"
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
Length = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
_MOST_AXES = msgspec.Meta(max_length=8)


class TensorRecord(Record, frozen=True, kw_only=True):
    """One tensor of a component under its published name and in its published shape, (out, in, *kernel) for weights.

    An 8-bit tensor is stored without its scales, which are the graph's: its values are not the published ones, and
    nothing changes them after the export.
    """

    name: Name
    shape: Annotated[tuple[Length, ...], _MOST_AXES]
    dtype: Literal["float32", "float16", "bfloat16", "int8", "float8e4m3fn"]
    permutation: Annotated[tuple[Natural, ...], _MOST_AXES] | None = None
    """The axes of the published tensor in the order in which they are stored; None: as published."""
    offset: Natural | None = None
    """The position of its first byte in the weights file; None: the graph does not use the tensor."""

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Return the shape in which the tensor is stored."""
        return self.shape if self.permutation is None else tuple(self.shape[axis] for axis in self.permutation)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the stored tensor."""
        return math.prod(self.shape) * _SIZES[self.dtype]


class Slot(Record, frozen=True, kw_only=True):
    """A linear layer or a convolution that takes LoRAs as inputs; `kernel` is a convolution's, () for a linear layer.

    `module` is its published name; `inputs` and `outputs` are the second and first size of its weight.
    """

    module: str
    inputs: Positive
    outputs: Positive
    kernel: tuple[Positive, ...] = ()

    @property
    def columns(self) -> int:
        """Return the second size of the weight as a matrix: inputs · kernel."""
        return self.inputs * math.prod(self.kernel)

    def shapes(self, adapters: int | str = 1, rank: int | str = RANK) -> dict[str, tuple[int | str, ...]]:
        """Return the shapes of its two inputs by name, ``lora_down`` first."""
        if self.kernel:
            return {self.module + DOWN: (rank, self.columns), self.module + UP: (self.outputs, rank)}
        return {self.module + DOWN: (adapters, self.inputs, rank), self.module + UP: (adapters, rank, self.outputs)}

    def sizes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of its two inputs at `rank`, for LoRAs that all rows share."""
        return {name: tuple(rank if size == RANK else int(size) for size in shape)
                for name, shape in self.shapes().items()}  # fmt: skip


def slot_dtype(precision: Precision) -> DType:
    """Return the dtype of the inputs of a component's slots: that of its other inputs, fp16 beside 8-bit layers."""
    return "float16" if precision in ("fp16", *EIGHT_BIT) else "float32"


def is_slot_input(name: str) -> bool:
    """Return whether an input of a graph belongs to a slot."""
    return name.endswith((DOWN, UP))


class AdapterTable(Record, frozen=True, kw_only=True, dict=True):
    """All tensors of a component's model, in the order of their offsets; those that its graph does not use last."""

    version: Positive = 1
    tensors: tuple[TensorRecord, ...]
    slots: tuple[Name, ...] = ()
    """The modules that have a slot in the component's slot graph, in the order of its inputs."""

    @cached_property
    def slots_by_module(self) -> Mapping[str, Slot]:
        """Return {module: its slot}, in the order of the slot graph's inputs."""
        shapes = {module: self.by_name[module + WEIGHT].shape for module in self.slots}
        return {
            module: Slot(module=module, outputs=shape[0], inputs=shape[1], kernel=shape[2:])
            for module, shape in shapes.items()
        }

    @cached_property
    def by_name(self) -> Mapping[str, TensorRecord]:
        """Return {published name: record}."""
        return {tensor.name: tensor for tensor in self.tensors}

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return {published name: published shape}."""
        return {tensor.name: tensor.shape for tensor in self.tensors}


def read_table(bundle: Bundle, name: str) -> AdapterTable:
    """Return the table of component `name`, with its digest checked and its offsets inside the weights file.

    Raises IncompatibleError if the bundle was exported by a version that wrote none, CorruptError for a broken one.
    """
    component = bundle.manifest.components[name]
    if component.adapters is None:
        raise IncompatibleError(f"{bundle.root}: {name} has no {ADAPTERS_FILE}, which LoRAs need; this bundle is of an"
                                f" older version: {_REMEDY}")  # fmt: skip
    path = bundle.path(component.adapters)
    if component.adapters.size > _MOST_BYTES:
        raise CorruptError(f"{path}: larger than {_MOST_BYTES >> 20} MiB, so not a table of tensors; {_REMEDY}")
    verify_file(path, component.adapters)
    try:
        table = msgspec.json.decode(path.read_bytes(), type=AdapterTable)
    except OSError as exc:
        raise explain_os_error(exc, f"reading {path}") from exc
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise CorruptError(f"{path}: broken table ({exc}); {_REMEDY}") from exc
    _check(path, table, component.weights.size, eight_bit=component.eight_bit)
    return table


def _check(path: Path, table: AdapterTable, size: int, *, eight_bit: bool) -> None:
    """Raise CorruptError unless names are unique and tensors lie one after the other inside `size` bytes.

    Only a component in 8 bits may have tensors in 8 bits.
    """
    if table.version > 1:
        raise IncompatibleError(f"{path}: version {table.version} is newer than this sdxl-trt reads; upgrade sdxl-trt")
    if len(table.tensors) > _MOST_TENSORS or len(table.by_name) != len(table.tensors):
        raise CorruptError(f"{path}: names {len(table.tensors)} tensors, {len(table.by_name)} of them different;"
                           f" {_REMEDY}")  # fmt: skip
    odd = [module for module in table.slots if len(table.shapes.get(module + WEIGHT, ())) not in (2, 4)]
    if odd or len(set(table.slots)) != len(table.slots):
        raise CorruptError(f"{path}: names slots of modules without a matrix or a kernel, or twice: {odd[:1]};"
                           f" {_REMEDY}")  # fmt: skip
    end = 0
    for tensor in table.tensors:
        permutation = tensor.permutation
        if permutation is not None and sorted(permutation) != list(range(len(tensor.shape))):
            raise CorruptError(f"{path}: {tensor.name} has axes {list(tensor.shape)} in the order {list(permutation)};"
                               f" {_REMEDY}")  # fmt: skip
        if _SIZES[tensor.dtype] == 1 and not eight_bit:
            raise CorruptError(f"{path}: {tensor.name} is {tensor.dtype}, but its component is not in 8 bits;"
                               f" {_REMEDY}")  # fmt: skip
        if tensor.offset is None:
            continue
        if tensor.offset < end or tensor.offset % _SIZES[tensor.dtype] or tensor.offset + tensor.nbytes > size:
            raise CorruptError(f"{path}: {tensor.name} at byte {tensor.offset} overlaps another tensor or lies outside"
                               f" the {size} bytes of weights; {_REMEDY}")  # fmt: skip
        end = tensor.offset + tensor.nbytes
