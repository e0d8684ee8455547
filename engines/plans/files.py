"""Plan files: their paths in a bundle, and reading them with a check of their digests."""

__all__ = ["PLANS", "plan_path", "rebuild_command", "remove_write_permission", "start_reading"]

import stat
from pathlib import Path

from sdxl_trt.engines.bundle import MANIFEST, Bundle, Chunks, Flavour, PlanKey, PlanRecord
from sdxl_trt.engines.errors import CorruptError, explain_os_error
from sdxl_trt.engines.host import owned_by_another, shell_word, writable_by_others
from sdxl_trt.engines.plans.reading import PlanReader

PLANS = "plans"
_DIGITS = 12


def plan_path(key: PlanKey) -> str:
    """Return the path of the plan with this key, relative to the bundle."""
    rank = f"-lora{key.lora_rank}" if key.lora_rank else ""
    return f"{PLANS}/{key.component}-{key.environment.flavour}{rank}-{key.digest()[:_DIGITS]}.plan"


def rebuild_command(bundle: Bundle, flavour: Flavour, lora_rank: int = 0) -> str:
    """Return the command that builds missing and stale plans, also those for LoRAs of up to `lora_rank`."""
    rank = f" --lora-rank {lora_rank}" if lora_rank else ""
    return f"export-engines --engine {flavour}{rank} --out {shell_word(bundle.root)}"


def start_reading(bundle: Bundle, record: PlanRecord, threads: int | None = None) -> PlanReader:
    """Return a reader of a plan, whose threads have begun; the caller closes it. `threads` as in PlanReader.

    A record without digests of chunks is of an older version: its file is read as one chunk. Raises CorruptError for
    a file of another size, or if other users could have written it; ResourceError if it does not fit into memory.
    """
    path = bundle.path(record.file)
    for place in (bundle.root, bundle.root / MANIFEST, path.parent, path):
        _check_private(place)
    size, chunks = record.file.size, record.chunks
    if chunks is None:
        chunks = Chunks(size=max(size, 1), sha256=(record.file.sha256,))
    elif not chunks.fit(size):
        raise _damaged(bundle, record, f"{len(chunks.sha256)} digests do not cover {size} bytes")
    return PlanReader(path, size, chunks.size, chunks.sha256, lambda why: _damaged(bundle, record, why), threads)


def _damaged(bundle: Bundle, record: PlanRecord, reason: str) -> CorruptError:
    command = rebuild_command(bundle, record.key.environment.flavour, record.key.lora_rank)
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
