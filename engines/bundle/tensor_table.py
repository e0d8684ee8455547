"""``adapters.json``: where each tensor of a component lies in its weights file, under its published name."""

__all__ = ["ADAPTERS_FILE", "AdapterTable", "TensorRecord", "read_table"]

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from sdxl_trt.engines.bundle.bundle import Bundle
from sdxl_trt.engines.bundle.digests import verify_file
from sdxl_trt.engines.bundle.records import Natural, Positive, Record
from sdxl_trt.engines.errors import CorruptError, IncompatibleError, explain_os_error

ADAPTERS_FILE = "adapters.json"
_MOST_BYTES = 16 << 20
_MOST_TENSORS = 100_000
_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
_REMEDY = "run export-engines again"
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
Length = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
_MOST_AXES = msgspec.Meta(max_length=8)


class TensorRecord(Record, frozen=True, kw_only=True):
    """One tensor of a component under its published name and in its published shape, (out, in, *kernel) for weights."""

    name: Name
    shape: Annotated[tuple[Length, ...], _MOST_AXES]
    dtype: Literal["float32", "float16", "bfloat16"]
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


class AdapterTable(Record, frozen=True, kw_only=True, dict=True):
    """All tensors of a component's model, in the order of their offsets; those that its graph does not use last."""

    version: Positive = 1
    tensors: tuple[TensorRecord, ...]

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
    _check(path, table, component.weights.size)
    return table


def _check(path: Path, table: AdapterTable, size: int) -> None:
    """Raise CorruptError unless names are unique and tensors lie one after the other inside `size` bytes."""
    if table.version > 1:
        raise IncompatibleError(f"{path}: version {table.version} is newer than this sdxl-trt reads; upgrade sdxl-trt")
    if len(table.tensors) > _MOST_TENSORS or len(table.by_name) != len(table.tensors):
        raise CorruptError(f"{path}: names {len(table.tensors)} tensors, {len(table.by_name)} of them different;"
                           f" {_REMEDY}")  # fmt: skip
    end = 0
    for tensor in table.tensors:
        permutation = tensor.permutation
        if permutation is not None and sorted(permutation) != list(range(len(tensor.shape))):
            raise CorruptError(f"{path}: {tensor.name} has axes {list(tensor.shape)} in the order {list(permutation)};"
                               f" {_REMEDY}")  # fmt: skip
        if tensor.offset is None:
            continue
        if tensor.offset < end or tensor.offset % _SIZES[tensor.dtype] or tensor.offset + tensor.nbytes > size:
            raise CorruptError(f"{path}: {tensor.name} at byte {tensor.offset} overlaps another tensor or lies outside"
                               f" the {size} bytes of weights; {_REMEDY}")  # fmt: skip
        end = tensor.offset + tensor.nbytes
