"""Atomic writes, paths that stay inside a folder, digests and locks."""

__all__ = ["NO_LOCKS", "atomic_write", "contained", "exclusive", "sha256_file", "sibling"]

import contextlib
import errno
import hashlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from sdxl_trt.engines.errors import CorruptError, IncompatibleError, UsageError, explain_os_error
from sdxl_trt.engines.host.paths import refused_by_windows


@contextlib.contextmanager
def atomic_write(path: Path, *, replace: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file next to `path`; if the block succeeds, fsync it and rename it to `path`.

    The file's ``name`` is the absolute path of the temporary file.

    After a failure `path` is unchanged and the temporary file is removed. Raises an SdxlTrtError for an OSError;
    without `replace`, FileExistsError if `path` exists, even if it was created in the meantime.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as exc:
        raise explain_os_error(exc, f"writing {path}") from exc
    temporary = Path(name)
    try:
        # Opened under its name, which tells another process where the file is.
        with open(temporary, "wb", opener=lambda *_: handle) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        if replace:
            temporary.replace(path)
        else:
            _move_without_replacing(temporary, path)
    except FileExistsError:
        raise
    except OSError as exc:
        raise explain_os_error(exc, f"writing {path}") from exc
    finally:
        temporary.unlink(missing_ok=True)


def _move_without_replacing(temporary: Path, path: Path) -> None:
    """Link or rename `temporary` to `path`; raise FileExistsError if `path` exists."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: reserve the name with an empty file first
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
    """Return `root / relative`; raise CorruptError if it is absolute or has ``..`` or symbolic links.

    `relative` comes from a manifest or an index file and is not trusted.
    """
    parts = PurePosixPath(relative)
    unsafe = not relative or "\\" in relative or "\0" in relative or parts.is_absolute() or ".." in parts.parts
    # There "C:x" is a path on another drive, and NUL a device.
    unsafe = unsafe or (sys.platform == "win32" and any(map(refused_by_windows, parts.parts)))
    if unsafe:
        raise CorruptError(f"{root}: {relative!r} is not a plain path inside the folder; get an intact copy of it")
    path = root
    for part in parts.parts:
        path = path / part
        try:
            linked = path.is_symlink()
        except OSError as exc:
            raise CorruptError(
                f"{root}: {relative[:80]!r} is not a file in the folder ({exc.strerror}); get an intact copy of it"
            ) from exc
        if linked:
            raise CorruptError(f"{path}: is a symbolic link, which a bundle must not hold; copy the file itself there")
    return path


def sha256_file(path: Path) -> str:
    """Return the hex sha256 of a file, in constant memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


log = logging.getLogger("sdxl_trt.engines")
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)
"""Errors of flock on file systems without locks: NFS without its lock daemon, some FUSE and object stores."""


def sibling(folder: Path, suffix: str) -> Path:
    """Return the hidden path next to `folder` for `suffix`: its lock, its partial export, its old version."""
    return folder.with_name(f".{folder.name}.{suffix}")


@contextlib.contextmanager
def exclusive(folder: Path, *, lock: bool = True) -> Iterator[None]:
    """Hold the lock of `folder`, which need not exist; without `lock`, log a warning and continue unlocked.

    Raises UsageError if another process holds it, or if the file system has no locks. A lock file alone is not a
    lock: it would outlive a killed export, and two processes could create it at once.
    """
    if not lock:
        log.warning("%s is written without a lock; make sure that nothing else writes there until the end", folder)
        with _explain_os_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
        yield
        return
    try:
        from filelock import FileLock, Timeout  # noqa: PLC0415 - only writers need it
    except ImportError as exc:
        raise IncompatibleError("writing a bundle needs filelock; pip install 'sdxl-trt[tensorrt]'") from exc
    path = sibling(folder, "lock")
    held = FileLock(path, timeout=0, fallback_to_soft=False)
    with _explain_os_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            held.acquire()
        except Timeout as exc:
            raise UsageError(
                f"--out {folder}: another export is writing it; wait until it ends, or name another folder"
            ) from exc
        except OSError as exc:
            if exc.errno not in NO_LOCKS:
                raise
            path.unlink(missing_ok=True)  # it protects nothing
            raise UsageError(
                f"--out {folder}: its file system has no locks ({exc.strerror}); name a folder on a local disk, or"
                " make sure that nothing else writes there and add --no-lock"
            ) from exc
    try:
        yield
    finally:
        # The folder is complete by now, and a leftover file does not lock anything.
        with contextlib.suppress(OSError):
            # Before the release: a waiting process sees that the file is gone. On Windows, where an open file cannot be
            # removed, filelock removes it after the release.
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            held.release()


@contextlib.contextmanager
def _explain_os_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise explain_os_error(exc, f"writing to {folder.parent}") from exc
