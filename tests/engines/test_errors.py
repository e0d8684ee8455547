"""Every error has the exit code of the commands' contract."""

import errno
import os

import pytest

from sdxl_trt.engines import errors
from sdxl_trt.engines.errors import ResourceError, SdxlTrtError, UsageError, explain_os_error

# The contract of the commands, stated here and not read from the code.
EXIT_CODES = {
    "SdxlTrtError": 1,
    "UsageError": 2,
    "SizeError": 2,
    "SourceError": 2,
    "IncompatibleError": 3,
    "CorruptError": 4,
    "ResourceError": 5,
    "EngineError": 1,
    "VerificationError": 1,
}
PARENTS = {"SizeError": "UsageError", "SourceError": "UsageError"}


def _classes() -> dict[str, type[SdxlTrtError]]:
    found = {name: getattr(errors, name) for name in errors.__all__}
    return {name: value for name, value in found.items() if isinstance(value, type)}


def test_every_error_has_its_exit_code() -> None:
    assert {name: cls.exit_code for name, cls in _classes().items()} == EXIT_CODES


@pytest.mark.parametrize("name", [name for name in EXIT_CODES if name != "SdxlTrtError"])
def test_the_tree_of_errors_is_as_drawn(name: str) -> None:
    parent = PARENTS.get(name, "SdxlTrtError")
    assert _classes()[name].__bases__ == (_classes()[parent],)
    drawn = next(line for line in str(errors.__doc__).splitlines() if f" {name} " in line)
    assert f" {EXIT_CODES[name]} " in drawn


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOSPC, ResourceError),
        (errno.EDQUOT, ResourceError),
        (errno.EACCES, UsageError),
        (errno.EPERM, UsageError),
        (errno.EROFS, UsageError),
        (errno.ENOENT, UsageError),
        (errno.ENOTDIR, UsageError),
        (errno.EISDIR, UsageError),
        (errno.ENAMETOOLONG, UsageError),
        (errno.EIO, SdxlTrtError),
    ],
)
def test_an_os_error_is_explained(code: int, kind: type[SdxlTrtError]) -> None:
    reason = os.strerror(code)
    explained = explain_os_error(OSError(code, reason), "writing out.png")
    assert type(explained) is kind
    assert str(explained).startswith(f"writing out.png: {reason}")
    assert "\n" not in str(explained)


def test_an_os_error_without_errno_keeps_its_message() -> None:
    explained = explain_os_error(OSError("cannot mmap an empty file"), "reading weights")
    assert type(explained) is SdxlTrtError
    assert str(explained) == "reading weights: cannot mmap an empty file"


@pytest.mark.parametrize(
    ("number", "winerror", "remedy"),
    [
        (errno.EACCES, 32, "close the program that has the file open"),
        (errno.EACCES, 33, "close the program that has the file open"),
        (errno.EINVAL, 1224, "close the program that has the file open"),
        (errno.EINVAL, 123, "check the path"),
        (errno.EACCES, 5, "choose a place that you can read and write, or close the program that has files there open"),
        (errno.ENOSPC, 112, "free some space"),
    ],
)
def test_errors_of_windows_say_what_to_do(number: int, winerror: int, remedy: str) -> None:
    exc = OSError(number, "planted", "out.png")
    exc.winerror = winerror  # type: ignore[attr-defined]
    known = explain_os_error(exc, "writing out.png")
    assert isinstance(known, ResourceError if number == errno.ENOSPC else UsageError)
    assert str(known).startswith(f"writing out.png: planted; {remedy}")
