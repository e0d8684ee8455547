"""Plan files: their paths in a bundle, and reading them with a check of their sha256."""

__all__ = ["PLANS", "plan_path", "read_plan", "rebuild_command", "remove_write_permission"]

import hashlib
import os
import stat
from pathlib import Path

import numpy as np

from sdxl_trt.engines.bundle import MANIFEST, Bundle, Flavour, PlanKey, PlanRecord
from sdxl_trt.engines.errors import CorruptError, ResourceError, explain_os_error
from sdxl_trt.engines.host import owned_by_another, shell_word, writable_by_others

PLANS = "plans"
_DIGITS = 12
_CHUNK = 64 << 20


def plan_path(key: PlanKey) -> str:
    """Return the path of the plan with this key, relative to the bundle."""
    return f"{PLANS}/{key.component}-{key.environment.flavour}-{key.digest()[:_DIGITS]}.plan"


def rebuild_command(bundle: Bundle, flavour: Flavour) -> str:
    """Return the command that builds missing and stale plans."""
    return f"export-engines --engine {flavour} --out {shell_word(bundle.root)}"


def read_plan(bundle: Bundle, record: PlanRecord) -> memoryview:
    """Return the bytes of a plan in a buffer that the caller owns, read once and checked in place.

    Raises CorruptError if the size or sha256 differs from the manifest's, or if other users could have written the
    file; ResourceError if it does not fit into memory.
    """
    path = bundle.path(record.file)
    for place in (bundle.root, bundle.root / MANIFEST, path.parent, path):
        _check_private(place)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != record.file.size:
                raise _damaged(bundle, record, f"{size} bytes, but the manifest says {record.file.size}")
            buffer = np.empty(size, np.uint8).data
            digest = hashlib.sha256()
            for start in range(0, size, _CHUNK):
                part = buffer[start : start + _CHUNK]
                if file.readinto(part) != len(part):
                    raise _damaged(bundle, record, "it became shorter while it was read")
                digest.update(part)
    except MemoryError as exc:
        raise ResourceError(f"reading {path}: out of host memory ({record.file.size / 1e9:.1f} GB);"
                            " close other programs") from exc  # fmt: skip
    except OSError as exc:
        raise explain_os_error(exc, f"reading {path}") from exc
    if digest.hexdigest() != record.file.sha256:
        raise _damaged(bundle, record, "its sha256 is not the manifest's")
    return buffer


def _damaged(bundle: Bundle, record: PlanRecord, reason: str) -> CorruptError:
    command = rebuild_command(bundle, record.key.environment.flavour)
    return CorruptError(f"{bundle.path(record.file)}: {reason}; the plan is damaged: build it again with: {command}")


def remove_write_permission(path: Path) -> None:
    """Let only the owner write `path`, whatever the umask: plans are code."""
    try:
        path.chmod(stat.S_IMODE(path.stat().st_mode) & ~(stat.S_IWGRP | stat.S_IWOTH))
    except OSError as exc:
        raise explain_os_error(exc, f"writing {path}") from exc


def _check_private(path: Path) -> None:
    """Raise CorruptError if other users can write `path`: they could have changed a plan, or its digest."""
    try:
        status = path.stat()
    except OSError as exc:
        raise explain_os_error(exc, f"reading {path}") from exc
    if writable_by_others(status):
        raise CorruptError(f"{path}: other users can write it, and plans are code that would run here; chmod go-w it,"
                           " or build plans in a folder of your own")  # fmt: skip
    if owned_by_another(status):
        raise CorruptError(f"{path}: belongs to another user, and plans are code that would run here; copy the bundle"
                           " to a folder of your own")  # fmt: skip
