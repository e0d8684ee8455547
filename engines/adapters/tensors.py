"""Tensors of one safetensors file: names, shapes and dtypes are read on opening, values later, with numpy alone."""

__all__ = ["StoredTensor", "TensorFile", "is_finite", "open_tensors", "read_finite", "read_raw", "read_tensor"]

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines.adapters.first_bytes import check_first_bytes, explain_damage
from sdxl_trt.engines.errors import CorruptError, SourceError, explain_os_error
from sdxl_trt.engines.host import require_utf8

# The bits of one number of each dtype of safetensors; an F4 has half a byte.
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_NUMPY = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "I16": "<i2", "U16": "<u2", "F16": "<f2", "I32": "<i4", "U32": "<u4",
    "F32": "<f4", "I64": "<i8", "U64": "<u8", "F64": "<f8",
}  # fmt: skip
# Exponent bits, exponent bias; e4m3 has no infinity, and NaN only where all bits are set.
_FP8 = {"F8_E4M3": (4, 7), "F8_E5M2": (5, 15)}

# SDXL has about 2500 weights and biases; a LoRA has up to nine tensors for one.
_MOST_TENSORS = 50_000


@dataclass(frozen=True)
class StoredTensor:
    """Location of one tensor of a file, its shape, and its safetensors dtype name ("F16", "F32", …).

    `offset` is the position of its first byte in the file. `stamp` identifies the state of the file on opening.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    offset: int = 0
    stamp: tuple[int, int] | None = None

    @property
    def nbytes(self) -> int:
        """Return the number of bytes in the file."""
        return _nbytes(self.dtype, self.shape)


@dataclass(frozen=True)
class TensorFile:
    """An opened safetensors file: its tensors by key, in the file's order, and the metadata of its header."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str] = field(default_factory=dict)


def open_tensors(path: Path) -> TensorFile:
    """Open a safetensors file, whatever its name; safetensors checks its header.

    Raises CorruptError if it is broken, SourceError if it is of another format, has a dtype without a known size
    or more tensors than any model, UsageError if it cannot be read.
    """
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - only runs with adapters need it

    require_utf8(path, "safetensors")
    check_first_bytes(path)
    try:
        stamp = _stamp(path.stat())
        with safe_open(path, framework="np") as handle:
            _check_count(path, len(handle.keys()))
            parts = {key: handle.get_slice(key) for key in handle.offset_keys()}
            described = [(key, tuple(part.get_shape()), str(part.get_dtype())) for key, part in parts.items()]
            metadata = handle.metadata() or {}
    except SafetensorError as exc:
        raise explain_damage(path, exc) from exc
    except OSError as exc:
        raise explain_os_error(exc, f"reading {path}") from exc
    return TensorFile(path, _placed(path, described, stamp), metadata)


def _check_count(path: Path, count: int) -> None:
    if count > _MOST_TENSORS:
        raise SourceError(f"{path}: holds {count} tensors, expected at most {_MOST_TENSORS}; use another file")


def _placed(
    path: Path, described: list[tuple[str, tuple[int, ...], str]], stamp: tuple[int, int]
) -> dict[str, StoredTensor]:
    """Return the tensors with their offsets: safetensors refuses files with gaps, and the last one ends the file."""
    unknown = next(((key, dtype) for key, _, dtype in described if dtype not in _BITS), None)
    if unknown is not None:
        raise SourceError(f"{path}: {unknown[0]!r} is {unknown[1]}, a dtype that is not supported; save it as fp16")
    offset = stamp[0] - sum(_nbytes(dtype, shape) for _, shape, dtype in described)
    tensors = {}
    for key, shape, dtype in described:
        tensors[key] = StoredTensor(path, key, shape, dtype, offset, stamp)
        offset += tensors[key].nbytes
    return tensors


def read_tensor(info: StoredTensor) -> NDArray[Any]:
    """Return the values of a tensor as a new array of its shape; the caller owns it.

    bf16 and fp8 become fp32, which represents both exactly; all others keep their dtype. Raises CorruptError if the
    file has changed since it was opened.
    """
    raw = read_raw(info)
    if info.dtype == "BF16":
        values = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    elif info.dtype in _FP8:
        values = _fp8_values(info.dtype)[raw]
    elif info.dtype in _NUMPY:
        values = raw.view(_NUMPY[info.dtype])
    else:
        raise SourceError(f"{info.file}: {info.key!r} is {info.dtype}, which is not supported; save it as fp16")
    return values.reshape(info.shape)


def read_finite(info: StoredTensor) -> NDArray[np.float32]:
    """Return one tensor of a LoRA in fp32. Raises CorruptError for NaN or infinite values, or a file that changed."""
    with np.errstate(over="ignore"):
        weight = read_tensor(info).astype(np.float32, copy=False)
    if not is_finite(weight):
        raise CorruptError(f"{info.file}: {info.key!r} holds NaN or infinite weights; the LoRA is damaged")
    return weight


def is_finite(weight: NDArray[np.float32]) -> bool:
    """Return whether all numbers are finite, of an intact weight without memory beside it."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(weight.sum())) or bool(np.isfinite(weight).all())


def read_raw(info: StoredTensor) -> NDArray[np.uint8]:
    """Return the bytes of a tensor as they are stored, in a new array. Raises CorruptError if the file has changed."""
    raw = np.empty(info.nbytes, np.uint8)
    try:
        with info.file.open("rb", buffering=0) as file:
            changed = info.stamp is not None and _stamp(os.fstat(file.fileno())) != info.stamp
            file.seek(info.offset)
            view = raw.data
            while not changed and len(view) > 0:
                count = file.readinto(view) or 0
                changed, view = count == 0, view[count:]
    except OSError as exc:
        raise explain_os_error(exc, f"reading {info.file}") from exc
    if changed:
        raise CorruptError(f"{info.file}: changed while it was in use; run again")
    return raw


def _fp8_values(dtype: str) -> NDArray[np.float32]:
    """Return the 256 values of an fp8 dtype."""
    exponent_bits, bias = _FP8[dtype]
    mantissa_bits = 7 - exponent_bits
    codes = np.arange(256)
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    fraction = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    values = np.where(exponent > 0, (1 + fraction) * 2.0 ** (exponent - bias), fraction * 2.0 ** (1 - bias))
    if dtype == "F8_E4M3":
        values[(codes & 0x7F) == 0x7F] = np.nan
    else:
        top = exponent == (1 << exponent_bits) - 1
        values[top] = np.where(fraction[top] == 0, np.inf, np.nan)
    return np.where(codes >= 128, -values, values).astype(np.float32)


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * _BITS[dtype] // 8


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns
