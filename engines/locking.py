"""One writer of a folder at a time: a lock beside it, held by the system and so gone with its holder."""

__all__ = ["exclusive", "sibling"]

import contextlib
from collections.abc import Iterator
from pathlib import Path

from sdxl_trt.engines.errors import IncompatibleError, UsageError, explain_os_error


def sibling(folder: Path, suffix: str) -> Path:
    """Return the hidden neighbour of `folder` that serves `suffix`: its lock, its partial, its old one."""
    return folder.with_name(f".{folder.name}.{suffix}")


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`, which need not exist; raise UsageError where another process has it."""
    try:
        from filelock import FileLock, Timeout  # noqa: PLC0415 - only writers need it
    except ImportError as exc:
        raise IncompatibleError("writing a bundle needs filelock; pip install 'sdxl-trt[tensorrt]'") from exc
    path = sibling(folder, "lock")
    lock = FileLock(path, timeout=0)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as exc:
        raise UsageError(f"--out {folder}: another export is writing it; wait for its end, or name another") from exc
    except OSError as exc:
        raise explain_os_error(exc, f"writing to {folder.parent}") from exc
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: who waits for it sees that it is gone
        lock.release()
