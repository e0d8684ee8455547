"""Amounts of memory: parsed, formatted, and what the host has left."""

__all__ = ["available_host_memory", "format_bytes", "parse_bytes", "process_memory", "return_freed_memory"]

import ctypes
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

from sdxl_trt.engines.errors import UsageError
from sdxl_trt.engines.host import windows

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("", 1000), ("B", 1000), ("IB", 1024))
}
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def parse_bytes(text: str) -> int:
    """Return `text` in bytes: "12GB" is 12e9, "12GiB" 12·2^30, "800M" 8e8, a bare number bytes.

    Raises UsageError for anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.ASCII | re.IGNORECASE)
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None:
        raise UsageError(f"size {text!r} is not an amount of memory; write it as 12GB, 12GiB or 800MB")
    return int(float(found[1]) * unit)


def format_bytes(amount: int) -> str:
    """Return `amount` bytes as text, in powers of 1000: "12.90 GB", "303 MB"."""
    if amount < 1_000_000:
        return f"{amount / 1000:.0f} kB"
    return f"{amount / 1e6:.0f} MB" if amount < 1_000_000_000 else f"{amount / 1e9:.2f} GB"


def available_host_memory() -> int | None:
    """Return the bytes that can be allocated without swapping, within the cgroup's limit; None if unknown."""
    if sys.platform == "win32":
        amounts = [windows.available_memory()]
    else:
        amounts = [_figures(_MEMINFO).get("MemAvailable"), _cgroup_available()]
    return min((amount for amount in amounts if amount is not None), default=None)


def process_memory(pid: int | None = None) -> dict[str, int]:
    """Return a process's memory in bytes by kind ("VmHWM", "RssAnon", …); empty if the system does not show it.

    Without `pid` it is this process's. The kinds are Linux's; `windows.memory_of` says what Windows shows of them.
    """
    if sys.platform == "win32":
        return windows.memory_of(pid or os.getpid())
    else:  # noqa: RET505 - the type checker reads the branches of a platform
        return _figures(Path(f"/proc/{pid or 'self'}/status"))


def return_freed_memory() -> None:
    """Return memory that this process has freed to the system, where the C library keeps it; elsewhere do nothing.

    glibc keeps what ONNX Runtime frees after it has packed a session's weights, a third of the session's memory, and
    most of a session that has ended.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # a C library without it
            ctypes.CDLL(None).malloc_trim(0)


def _figures(file: Path) -> dict[str, int]:
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    return {name: int(value) << 10 for name, value in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def _cgroup_available() -> int | None:
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = (_CGROUP / "memory.current").read_text(encoding="ascii").strip()
    except OSError:
        return None
    return None if limit == "max" else max(0, int(limit) - int(used))
