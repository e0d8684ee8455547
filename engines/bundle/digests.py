"""Digests of large files, checked before use and cached until the file changes.

sha256 takes about 0.6 s per gigabyte. Digests computed here are kept in a user-private cache, keyed by
(device, inode, size, mtime, ctime): a file that was touched in any way is read again. On Windows ctime is the time of
creation, so a change that keeps the size and sets the old mtime goes unnoticed there.
"""

__all__ = ["verify_file"]

import contextlib
import json
import os
from pathlib import Path

from sdxl_trt.engines.bundle.records import FileRecord
from sdxl_trt.engines.errors import CorruptError, SdxlTrtError, explain_os_error
from sdxl_trt.engines.host import atomic_write, cache_folder, read_private, sha256_file

REMEMBER_FROM = 64 << 20
"""Smaller files are hashed every time: that is faster than a look into the cache."""
MAX_ENTRIES = 512
_MOST_BYTES = 1 << 20


def verify_file(path: Path, record: FileRecord) -> None:
    """Raise CorruptError unless the file at `path` has the size and sha256 of `record`."""
    try:
        status = path.stat()
        digest = _digest(path, status) if status.st_size == record.size else None
    except OSError as exc:
        raise explain_os_error(exc, f"reading {path}") from exc
    if digest is None:
        raise CorruptError(f"{path}: {status.st_size} bytes, but the manifest says {record.size}; the file is truncated"
                           " or was changed: run export-engines again")  # fmt: skip
    if digest != record.sha256:
        raise CorruptError(f"{path}: its sha256 is not the manifest's; the file is damaged or was changed: run"
                           " export-engines again")  # fmt: skip


def _digest(path: Path, status: os.stat_result) -> str:
    if status.st_size < REMEMBER_FROM:
        return sha256_file(path)
    key = ":".join(
        str(n) for n in (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    )
    memory = _recall()
    if key not in memory:
        memory[key] = sha256_file(path)
        _remember(memory)
    return memory[key]


def _cache_file() -> Path:
    return cache_folder() / "digests.json"


def _recall() -> dict[str, str]:
    """Return the cached digests; empty if the cache is missing, unreadable, or writable by other users."""
    try:
        memory = json.loads(read_private(_cache_file(), _MOST_BYTES) or b"{}")
    except (ValueError, RuntimeError):
        return {}
    return {str(k): str(v) for k, v in memory.items()} if isinstance(memory, dict) else {}


def _remember(memory: dict[str, str]) -> None:
    """Store the newest entries; failure to write the cache costs only time."""
    newest = dict(list(memory.items())[-MAX_ENTRIES:])
    with contextlib.suppress(OSError, SdxlTrtError, RuntimeError):
        file = _cache_file()
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with atomic_write(file) as stream:
            stream.write(json.dumps(newest).encode())
