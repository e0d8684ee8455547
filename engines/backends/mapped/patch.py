"""LoRAs on ONNX Runtime and OpenVINO: the changed tensors are written into a private copy of the mapped weights."""

__all__ = ["Patch", "plan_patch"]

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from mmap import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines.adapters import Changes, ScaledLora, component_role, plan_changes
from sdxl_trt.engines.bundle import Bundle, TensorRecord, read_table
from sdxl_trt.engines.errors import IncompatibleError

# Each thread holds one tensor in fp32, 52 MB for SDXL's largest, so more threads cost memory.
_MOST_THREADS = 4
_STORED: dict[str, Any] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2")}
_LARGEST = {"float32": float(np.finfo(np.float32).max), "float16": 65504.0, "bfloat16": 3.3895313892515355e38}
_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Patch:
    """The changes of LoRAs to a component's stored tensors; `records` are those that change, in the file's order."""

    changes: Changes
    records: tuple[TensorRecord, ...]

    @property
    def nbytes(self) -> int:
        """Return the bytes that `apply` writes: memory of the process while the weights are mapped."""
        return sum(record.nbytes for record in self.records)

    def apply(self, weights: mmap) -> None:
        """Change the tensors in `weights`, the whole weights file mapped copy-on-write; the file stays as it is.

        Beside the pages it changes, it needs one tensor in fp32 a thread. Raises CorruptError for a LoRA with NaN or
        infinite weights, or beyond the range of a tensor's dtype; the content of `weights` is then undefined.
        """
        data = np.frombuffer(weights, np.uint8)
        with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), "apply LoRAs") as threads:
            for _ in threads.map(lambda record: self._change(data, record), self.records):
                pass  # raises the first error, after which no other tensor is begun

    def _change(self, data: NDArray[np.uint8], record: TensorRecord) -> None:
        start = record.offset or 0
        stored = data[start : start + record.nbytes].view(_STORED[record.dtype]).reshape(record.stored_shape)
        published = stored if record.permutation is None else stored.transpose(np.argsort(record.permutation))
        weight = _to_float32(published, record.dtype)
        self.changes.apply(record.name, weight)
        # What rounds to infinity is larger than the largest number by half a step at least; this refuses a little more.
        if max(weight.max(), -weight.min()) > _LARGEST[record.dtype]:
            raise self.changes.explain(record.name, f"too large for {_SHORT[record.dtype]}")
        published[...] = _to_bfloat16(weight) if record.dtype == "bfloat16" else weight


def plan_patch(bundle: Bundle, name: str, loras: Sequence[ScaledLora]) -> Patch:
    """Return the changes of `loras`, in order, to component `name`.

    A tensor that the graph does not use is left out; no tensor that changes may be in 8 bits. Raises IncompatibleError
    for a component without LoRAs or a bundle of an older version, SourceError for a LoRA of another model.
    """
    role = component_role(name)
    if role is None:
        raise IncompatibleError(f"{bundle.root}: {name} takes no LoRAs, only UNets and text encoders do")
    table = read_table(bundle, name)
    config = bundle.manifest.components[name].config
    changes = plan_changes([(each.lora, each.on(role)) for each in loras], role, table.shapes, config)
    used = (record for record in table.tensors if record.offset is not None)
    return Patch(changes, tuple(record for record in used if record.name in changes.names))


def _to_float32(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Return a contiguous copy in fp32."""
    if dtype == "bfloat16":
        return (np.ascontiguousarray(values).astype(np.uint32) << 16).view(np.float32)
    return np.array(values, np.float32, order="C")


def _to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the bits of finite numbers rounded to bf16, to the nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
