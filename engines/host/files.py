"""Whole files or nothing: atomic writes, contained paths and digests that are read once."""

__all__ = ["NO_LOCKS", "atomic_write", "contained", "exclusive", "sha256_file", "sibling"]

import contextlib
import errno
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from sdxl_trt.engines.errors import CorruptError, IncompatibleError, UsageError, explain_os_error

CHUNK = 1 << 22


@contextlib.contextmanager
def atomic_write(path: Path, *, replace: bool = True) -> Iterator[BinaryIO]:
    """Open a sibling temporary file; on a clean exit fsync it and rename it over `path`.

    Any failure leaves `path` as it was and no temporary file behind. Raises one of our errors for an OSError; without
    `replace` FileExistsError where `path` is there, even if it has come to be there meanwhile.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as exc:
        raise explain_os_error(exc, f"writing {path}") from exc
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        if replace:
            temporary.replace(path)
        else:
            _move_to_free(temporary, path)
    except FileExistsError:
        raise
    except OSError as exc:
        raise explain_os_error(exc, f"writing {path}") from exc
    finally:
        temporary.unlink(missing_ok=True)


def _move_to_free(temporary: Path, path: Path) -> None:
    """Give the file `temporary` the name `path` too, or instead; raise FileExistsError where that is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links: the name is taken first, by an empty file for a moment
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        try:
            temporary.replace(path)
        except BaseException:
            path.unlink()
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def contained(root: Path, relative: str) -> Path:
    """Return `root / relative`, refusing every way out of `root`: absolute, ``..``, links.

    `relative` comes from a manifest or an index file and is not trusted. Raises CorruptError.
    """
    parts = PurePosixPath(relative)
    unsafe = not relative or "\\" in relative or "\0" in relative or parts.is_absolute() or ".." in parts.parts
    if unsafe:
        raise CorruptError(f"{root}: {relative!r} is not a plain path inside the folder; get a sound copy of it")
    path = root
    for part in parts.parts:
        path = path / part
        try:
            linked = path.is_symlink()
        except OSError as exc:
            raise CorruptError(
                f"{root}: {relative[:80]!r} is no file of the folder ({exc.strerror}); get a sound copy of it"
            ) from exc
        if linked:
            raise CorruptError(f"{path}: is a symbolic link, which a bundle may not hold; copy the file itself there")
    return path


def sha256_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Return the hex digest of a file, in constant memory; `progress` is told the bytes of each chunk."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            if progress:
                progress(len(chunk))
    return digest.hexdigest()


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
