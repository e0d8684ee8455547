"""The user's cache folder, and whether other users could have written a file in it.

On Windows a user's folders are protected by access control lists that they inherit from the profile, and the mode bits
and owners of POSIX do not exist: files there count as private.
"""

__all__ = ["cache_folder", "owned_by_another", "read_private", "writable_by_others"]

import os
import stat
import sys
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder for all that this project caches, which may not exist yet.

    It is ``sdxl-trt`` in $XDG_CACHE_HOME, or else in ``%LOCALAPPDATA%`` on Windows and ``~/.cache`` elsewhere. Raises
    RuntimeError if the user has no home.
    """
    root = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else None)
    return (Path(root) if root else Path.home() / ".cache") / "sdxl-trt"


def writable_by_others(status: os.stat_result) -> bool:
    """Return whether users other than the owner can write a file of this status."""
    return sys.platform != "win32" and bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def owned_by_another(status: os.stat_result) -> bool:
    """Return whether a file of this status belongs to a user who is neither this one nor root."""
    return sys.platform != "win32" and status.st_uid not in (0, os.getuid())


def read_private(path: Path, most: int) -> bytes:
    """Return the content of a cached file; b"" if it is missing, larger than `most` bytes, or not private."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            private = not writable_by_others(status) and not owned_by_another(status)
            return file.read() if private and status.st_size <= most else b""
    except OSError:
        return b""
