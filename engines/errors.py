"""The exceptions of sdxl-trt, each with the exit code that the commands return for it.

    SdxlTrtError                 1   any other error with a known cause
    ├── UsageError               2   an argument that cannot be honoured
    │   ├── SizeError            2   a picture size that the models cannot take
    │   └── SourceError          2   missing, wrong or unsafe input model
    ├── IncompatibleError        3   newer bundle format, stale plan, precision that a provider cannot run
    ├── CorruptError             4   wrong digest, truncation, broken manifest, missing tensors or wrong shapes
    ├── ResourceError            5   out of memory or disk
    ├── EngineError              1   a backend failed; the cause is chained
    └── VerificationError        1   an exported graph does not compute what its model computes

A message is one line: what was received, what was expected and what to do. The tree is modelled on httpx's. Backend
errors are mapped with ``raise … from exc``.
"""

__all__ = [
    "CorruptError",
    "EngineError",
    "IncompatibleError",
    "ResourceError",
    "SdxlTrtError",
    "SizeError",
    "SourceError",
    "UsageError",
    "VerificationError",
    "explain_os_error",
]

import errno
from typing import ClassVar


class SdxlTrtError(Exception):
    """Base class of every error that sdxl-trt raises deliberately."""

    exit_code: ClassVar[int] = 1


class UsageError(SdxlTrtError):
    """An argument that cannot be honoured; the message names the nearest valid one."""

    exit_code = 2


class SizeError(UsageError):
    """A picture size that the UNets, or the profiles of a plan, do not accept."""


class SourceError(UsageError):
    """A model source that is missing, of the wrong class, or in a format that is unsafe to read."""


class IncompatibleError(SdxlTrtError):
    """Valid input that this version, machine or provider cannot run."""

    exit_code = 3


class CorruptError(SdxlTrtError):
    """File contents that do not match their digest, size or format."""

    exit_code = 4


class ResourceError(SdxlTrtError):
    """Out of memory, or out of disk."""

    exit_code = 5


class EngineError(SdxlTrtError):
    """A backend failed for a reason other than memory or a damaged file."""


class VerificationError(SdxlTrtError):
    """An exported graph that does not compute what its model computes, or whose activations overflow its precision."""


# Windows neither replaces nor removes a file that is open or mapped: ERROR_SHARING_VIOLATION, ERROR_LOCK_VIOLATION,
# ERROR_USER_MAPPED_FILE. ERROR_INVALID_NAME has the errno of an invalid argument.
_HELD, _INVALID_NAME = (32, 33, 1224), 123


def explain_os_error(exc: OSError, doing: str) -> SdxlTrtError:
    """Return the SdxlTrtError for `exc`; `doing` describes the operation that failed ("writing out.png")."""
    reason = exc.strerror or str(exc)
    windows = getattr(exc, "winerror", None)
    if windows in _HELD:
        return UsageError(f"{doing}: {reason}; close the program that has the file open, and repeat the command")
    if windows == _INVALID_NAME:
        return UsageError(f"{doing}: {reason}; check the path")
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"{doing}: {reason}; free some space, or write to another disk")
    if exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        # What Windows also says where a program has a file open in a folder that is to be moved.
        held = "" if windows is None else ", or close the program that has files there open"
        return UsageError(f"{doing}: {reason}; choose a place that you can read and write{held}")
    if exc.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG):
        return UsageError(f"{doing}: {reason}; check the path")
    return SdxlTrtError(f"{doing}: {reason}")
