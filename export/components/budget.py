"""Disk space and memory that an export needs, computed before it starts."""

__all__ = ["Needs", "measure"]

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdxl_trt.engines import ResourceError
from sdxl_trt.engines.host import available_host_memory
from sdxl_trt.export.checkpoints import REMAP_BYTES
from sdxl_trt.export.components.components import ComponentPlan

# Disk: graphs, tokenizers, the manifest. Memory: libraries and a traced graph, by benchmarks/full_size/export.py.
_DISK_EXTRA, _MEMORY_BASE = 64 << 20, 900 << 20
# A tensor as stored, its cast, its transpose, and the fp32 sum if a LoRA is fused.
_COPIES = 4
_FP32_BYTES = 4
# Bytes per parameter in ONNX Runtime: fp32 with packed copies; fp16 weights stay mapped beside their fp32 casts.
# Measured on SDXL's base UNet in fp16: 20.6 GB.
_VERIFY_BYTES = {"fp32": 6.0}
_VERIFY_BYTES_OF_OTHERS = 7.7


@dataclass(frozen=True)
class Needs:
    """Bytes needed and available; None if the system does not report them."""

    disk: int
    disk_free: int | None
    memory: int
    memory_free: int | None

    def require(self, out: Path) -> None:
        """Raise ResourceError if disk space or memory is short."""
        if self.disk_free is not None and self.disk > self.disk_free:
            raise ResourceError(f"--out {out}: needs {_gigabytes(self.disk)} of disk, {_gigabytes(self.disk_free)} is"
                                " free; free some space, or write to another disk")  # fmt: skip
        if self.memory_free is not None and self.memory > self.memory_free:
            raise ResourceError(f"exporting needs {_gigabytes(self.memory)} of memory, {_gigabytes(self.memory_free)}"
                                " is free; close other programs")  # fmt: skip


def measure(plans: Sequence[ComponentPlan], out: Path, verified: Sequence[ComponentPlan] = ()) -> Needs:
    """Return what it takes to export `plans` to `out`, and to compare `verified` with PyTorch, one at a time.

    An 8-bit component is first written, and run, in floating point. Disk space counts in full: the bundle that `out`
    replaces is removed only afterwards.
    """
    measured = [plan.in_floats() for plan in plans if plan.eight_bit]
    disk = sum(plan.bytes() for plan in (*plans, *measured)) + _DISK_EXTRA if plans else 0
    largest = max((math.prod(shape) for plan in plans for shape in plan.model.state.values()), default=0)
    memory = _MEMORY_BASE + REMAP_BYTES + _COPIES * _FP32_BYTES * largest if plans else 0
    memory = max([memory, *(_MEMORY_BASE + _verify_bytes(plan) for plan in (*verified, *measured))])
    return Needs(disk, _free(out), memory, available_host_memory())


def _verify_bytes(plan: ComponentPlan) -> int:
    parameters = sum(math.prod(plan.model.state[name]) for name in plan.tensor_names())
    return int(parameters * _VERIFY_BYTES.get(plan.precision, _VERIFY_BYTES_OF_OTHERS))


def _free(out: Path) -> int | None:
    folder = out.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
