"""What options state: finite numbers, and files or standard input read whole, up to a size limit."""

__all__ = ["STDIN", "check_inputs", "finite_number", "read_capped"]

import argparse
import math
import sys
from pathlib import Path

from sdxl_trt.engines.errors import SdxlTrtError, UsageError, explain_os_error

STDIN = Path("-")
"""The value of a file option that means standard input."""


def check_inputs(arguments: argparse.Namespace) -> None:
    """Raise UsageError if two options would read standard input, which can be read only once."""
    readers = [f"--{name}" for name in ("prompts", "workflow") if getattr(arguments, name) == STDIN]
    if len(readers) > 1:
        raise UsageError(f"{' - and '.join(readers)} - would both read standard input; give one of them as a file")


def finite_number(text: str) -> float | None:
    """Return the number that `text` states; None for infinity, NaN, and what is not a number."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def read_capped(path: Path, limit: int, option: str) -> bytes:
    """Return the bytes of the file `path`, or of standard input for ``-``.

    `option` is named in messages. Raises UsageError for more than `limit` bytes, for a file that is missing or
    unreadable, and if there is no standard input.
    """
    try:
        if path == STDIN:
            content = _standard_input(limit + 1, option)
        else:
            with path.open("rb") as file:
                content = file.read(limit + 1)
    except (OSError, ValueError) as exc:  # a ValueError for a NUL in the name
        raise _usage_error(exc, f"{option} {path}") from exc
    if len(content) > limit:
        raise UsageError(f"{option} {path}: is larger than {_size(limit)}; give a smaller one")
    return content


def _standard_input(most: int, option: str) -> bytes:
    if sys.stdin is None or sys.stdin.closed:
        raise UsageError(f"{option} -: there is no standard input; give a file, or pipe one in")
    return sys.stdin.buffer.read(most)


def _usage_error(exc: OSError | ValueError, doing: str) -> UsageError:
    known: SdxlTrtError | ValueError = explain_os_error(exc, doing) if isinstance(exc, OSError) else exc
    return known if isinstance(known, UsageError) else UsageError(f"{doing}: {exc}; check the path")


def _size(limit: int) -> str:
    return f"{limit >> 20} MiB" if limit >= 1 << 20 else f"{limit} bytes"
