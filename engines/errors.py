"""The exceptions of sdxl-trt, each with the exit code that the commands return for it.

    SdxlTrtError                 1   anything else that we can explain
    ├── UsageError               2   an argument that cannot be honoured
    │   ├── SizeError            2   a picture size that the models cannot take
    │   └── SourceError          2   missing, wrong or unsafe input model
    ├── IncompatibleError        3   newer bundle format, stale plan, precision that a provider cannot run
    ├── CorruptError             4   digest, truncation, broken manifest, missing or misshapen tensors
    ├── ResourceError            5   out of memory or disk
    ├── EngineError              1   a backend failed; the cause is chained
    └── VerificationError        1   an exported graph does not do what its model does

A message is one line that says what was received, what was expected and what to do. The tree is drawn
as httpx draws its own, and backend errors are mapped with ``raise … from exc``.
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
    """Base of every error that sdxl-trt raises on purpose."""

    exit_code: ClassVar[int] = 1


class UsageError(SdxlTrtError):
    """An argument that cannot be honoured; the message names the nearest one that can."""

    exit_code = 2


class SizeError(UsageError):
    """A picture size that the UNets, or the built profile, cannot take."""


class SourceError(UsageError):
    """A model source that is missing, of the wrong class, or stored in a form that is not safe to read."""


class IncompatibleError(SdxlTrtError):
    """Something sound that this version, machine or provider cannot run."""

    exit_code = 3


class CorruptError(SdxlTrtError):
    """Bytes that are not what they claim to be."""

    exit_code = 4


class ResourceError(SdxlTrtError):
    """Out of memory, or out of disk."""

    exit_code = 5


class EngineError(SdxlTrtError):
    """A backend failed for a reason that is neither memory nor a wrong file."""


class VerificationError(SdxlTrtError):
    """An exported graph that does not do what its model does, or a precision that its activations do not fit."""


def explain_os_error(exc: OSError, doing: str) -> SdxlTrtError:
    """Map `exc`, met while `doing` something ("writing out.png"), to one of ours."""
    reason = exc.strerror or str(exc)
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"{doing}: {reason}; free some space, or write to another disk")
    if exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UsageError(f"{doing}: {reason}; choose a place that you may write to and read from")
    if exc.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG):
        return UsageError(f"{doing}: {reason}; check the path")
    return SdxlTrtError(f"{doing}: {reason}")
