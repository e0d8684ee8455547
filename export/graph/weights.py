"""Stream tensors into one external-data file, cast them on the way, in constant memory."""

__all__ = ["WEIGHTS_FILE", "WeightsWriter", "WrittenWeights", "write_weights"]

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import onnx_ir as ir
import torch

from sdxl_trt.engines import CorruptError, explain_os_error
from sdxl_trt.engines.bundle import TensorRecord
from sdxl_trt.export.checkpoints import Checkpoint

WEIGHTS_FILE = "weights.data"
# Small tensors are packed; large ones are aligned to pages, so that engines can map them.
ALIGNMENT, PAGE, LARGE = 64, 4096, 1 << 20
CHECKED_AT_ONCE = 1 << 20
_NAMES: dict[torch.dtype, Literal["float32", "float16", "bfloat16"]] = {
    torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16",
}  # fmt: skip
_TORCH = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT64: torch.int64,
}


@dataclass(frozen=True)
class WrittenWeights:
    """The written file: its size and sha256, the number of parameters, and its tensors in order."""

    size: int
    sha256: str
    parameters: int
    tensors: tuple[TensorRecord, ...]


def write_weights(
    model: ir.Model,
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    permutations: Mapping[str, tuple[int, ...]],
    folder: Path,
    progress: Callable[[int], None] | None = None,
) -> WrittenWeights:
    """Write ``folder/weights.data`` from `checkpoint` and let the initializers of `model` refer to it.

    `names` maps initializers to checkpoint names. One tensor is in memory at a time. Raises CorruptError for
    NaN or infinite weights, and for weights that are finite in the checkpoint but infinite in fp16.
    """
    by_source: dict[str, ir.Value] = {names[name]: model.graph.initializers[name] for name in names}
    order = checkpoint.in_file_order(by_source)
    tensors: list[TensorRecord] = []
    try:
        with (folder / WEIGHTS_FILE).open("wb") as file:
            writer = WeightsWriter(file)
            for source, tensor in checkpoint.read(order):
                value = by_source[source]
                permutation = permutations.get(str(value.name))
                stored = _prepare(tensor, value, source, permutation, checkpoint)
                offset = writer.append(stored)
                shape, dtype = checkpoint.tensors[source].shape, _NAMES[stored.dtype]
                tensors.append(
                    TensorRecord(name=source, shape=shape, dtype=dtype, permutation=permutation, offset=offset)
                )
                value.const_value = _external(value, folder, offset, stored.nbytes)
                if progress:
                    progress(stored.nbytes)
            return WrittenWeights(writer.position, writer.digest.hexdigest(), writer.parameters, tuple(tensors))
    except OSError as exc:
        raise explain_os_error(exc, f"writing {folder / WEIGHTS_FILE}") from exc


class WeightsWriter:
    """Appends tensors to an open weights file, and counts what it wrote: bytes, parameters, sha256."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.position, self.parameters, self.digest = file, 0, 0, hashlib.sha256()

    def append(self, tensor: torch.Tensor) -> int:
        """Write `tensor` at the next aligned offset; return that offset."""
        alignment = PAGE if tensor.nbytes >= LARGE else ALIGNMENT
        self._write(bytes(-self.position % alignment))
        offset = self.position
        self._write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
        self.parameters += tensor.numel()
        return offset

    def _write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.position += len(data)


def _prepare(
    tensor: torch.Tensor,
    value: ir.Value,
    source: str,
    permutation: tuple[int, ...] | None,
    checkpoint: Checkpoint,
) -> torch.Tensor:
    info = checkpoint.tensors[source]
    dtype = _TORCH[ir.DataType(value.dtype)] if value.dtype is not None else tensor.dtype
    cast = tensor.reshape(info.shape).to(dtype)
    if not _finite(cast):
        if _finite(tensor):
            raise CorruptError(f"{info.file}: {source} has weights beyond fp16's range; export with --fp32 or --bf16")
        raise CorruptError(f"{info.file}: {source} holds NaN or infinite weights; the checkpoint is damaged")
    return (cast if permutation is None else cast.permute(permutation)).contiguous()


def _finite(tensor: torch.Tensor) -> bool:
    # In parts: checking the whole would need memory of the tensor's size, and twice that in half precision.
    # In fp32, since torch.isfinite does not support fp8.
    return all(bool(torch.isfinite(part.float()).all()) for part in tensor.reshape(-1).split(CHECKED_AT_ONCE))


def _external(value: ir.Value, folder: Path, offset: int, length: int) -> ir.ExternalTensor:
    if value.shape is None or value.dtype is None:
        raise CorruptError(f"{value.name}: the traced weight has no shape")
    return ir.ExternalTensor(
        WEIGHTS_FILE, offset, length, value.dtype, shape=value.shape, name=str(value.name), base_dir=folder
    )
