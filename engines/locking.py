"""One writer of a folder at a time: a lock beside it, held by the system and so gone with its holder."""

__all__ = ["NO_LOCKS", "exclusive", "sibling"]

import contextlib
import errno
import logging
from collections.abc import Iterator
from pathlib import Path

from sdxl_trt.engines.errors import IncompatibleError, UsageError, explain_os_error

log = logging.getLogger("sdxl_trt.engines")
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)
"""What flock answers on file systems that have no locks: NFS without its lock daemon, some FUSE and object stores."""


def sibling(folder: Path, suffix: str) -> Path:
    """Return the hidden neighbour of `folder` that serves `suffix`: its lock, its partial, its old one."""
    return folder.with_name(f".{folder.name}.{suffix}")


@contextlib.contextmanager
def exclusive(folder: Path, *, lock: bool = True) -> Iterator[None]:
    """Hold the lock of `folder`, which need not exist; without `lock` warn that there is none, and go on.

    Raises UsageError where another process has it, and where the file system takes no locks. A file that merely
    exists is never taken for one: it would outlive a killed export, and two could make it at once.
    """
    if not lock:
        log.warning("%s is written without a lock; see that nothing else writes there until the end", folder)
        with _explained(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
        yield
        return
    try:
        from filelock import FileLock, Timeout  # noqa: PLC0415 - only writers need it
    except ImportError as exc:
        raise IncompatibleError("writing a bundle needs filelock; pip install 'sdxl-trt[tensorrt]'") from exc
    path = sibling(folder, "lock")
    held = FileLock(path, timeout=0, fallback_to_soft=False)
    with _explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            held.acquire()
        except Timeout as exc:
            raise UsageError(
                f"--out {folder}: another export is writing it; wait for its end, or name another"
            ) from exc
        except OSError as exc:
            if exc.errno not in NO_LOCKS:
                raise
            path.unlink(missing_ok=True)  # it guards nothing
            raise UsageError(
                f"--out {folder}: its file system takes no locks ({exc.strerror}); name a folder on a local disk, or"
                " see that nothing else writes there and add --no-lock"
            ) from exc
    try:
        yield
    finally:
        # What has been written is whole by now; a file that is left behind is no lock.
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)  # while it is held: who waits for it sees that it is gone
        with contextlib.suppress(OSError):
            held.release()


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise explain_os_error(exc, f"writing to {folder.parent}") from exc
