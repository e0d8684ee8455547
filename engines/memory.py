"""What fits, and which residency follows: all engines loaded at once, or one expert at a time."""

__all__ = ["Residency", "available_host_memory", "choose_residency", "host_need"]

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from sdxl_trt.engines.bundle import Bundle, Component

Residency = Literal["resident", "swap"]

# ONNX Runtime's CPU provider computes in fp32: fp16 weights are held beside their fp32 casts and packed copies.
# Estimates from loading a 50 M-parameter UNet: 1.4 times the fp32 weights in fp32, 1.9 times in fp16.
_FP32_BYTES = 4
_OVERHEAD = {"fp32": 1.5, "fp16": 2.0, "bf16": 2.0, "mixed": 2.0}
# What a step needs beyond the weights, and what is left to everybody else.
_MARGIN = 0.8
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def host_need(component: Component) -> int:
    """Return about how many bytes of host memory a component takes on ONNX Runtime's CPU provider."""
    return int(component.parameters * _FP32_BYTES * _OVERHEAD[component.precision])


def available_host_memory() -> int | None:
    """Return the bytes that can be allocated without swapping, within the cgroup's limit; None where unknown."""
    candidates = [value for value in (_mem_available(), _cgroup_available()) if value is not None]
    return min(candidates, default=None)


def choose_residency(bundle: Bundle, wanted: str, available: int | None) -> Residency:
    """Return the policy for `wanted`: "auto" keeps everything resident where it fits in `available` bytes."""
    if wanted == "resident":
        return "resident"
    if wanted == "swap":
        return "swap"
    fits = available is None or _total(bundle.manifest.components.values()) <= _MARGIN * available
    return "resident" if fits else "swap"


def _total(components: Iterable[Component]) -> int:
    # The autoencoder's encoder is not part of a text-to-image run.
    return sum(host_need(component) for component in components if component.kind != "vae_encoder")


def _mem_available() -> int | None:
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def _cgroup_available() -> int | None:
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = (_CGROUP / "memory.current").read_text(encoding="ascii").strip()
    except OSError:
        return None
    return None if limit == "max" else max(0, int(limit) - int(used))
