"""Paths as texts: in commands that a user types, in records, and on outputs, whatever bytes a file system has in them.

Python has a byte of a path that is no UTF-8 as a lone surrogate, U+DC80 to U+DCFF, which no encoder takes.
"""

__all__ = ["OUTPUT_ERRORS", "is_utf8", "known_as", "require_utf8", "shell_word"]

import codecs
import shlex
from pathlib import Path

from sdxl_trt.engines.errors import UsageError

OUTPUT_ERRORS = "sdxl-trt-output"
"""The handler of errors for text outputs: such a byte is written as it is, and what the encoding lacks as an escape."""
_PLAIN = set(range(0x21, 0x7F)) - set(b"'\\")


def shell_word(value: Path | str) -> str:
    """Return `value` as one word of a shell's command line that stands on one line and in any encoding.

    What needs no quotes has none; what cannot be shown is in the ``$'\\xe9'`` of bash, zsh and POSIX 2024.
    """
    text = str(value)
    # Messages have each run of spaces as one.
    if text.isprintable() and "  " not in text:
        return shlex.quote(text)
    content = text.encode("utf-8", "surrogateescape" if _is_of_bytes(text) else "replace")
    return "$'" + "".join(chr(byte) if byte in _PLAIN else f"\\x{byte:02x}" for byte in content) + "'"


def known_as(path: Path) -> str:
    """Return the last part of a path for a record, which is UTF-8: bytes that are none are written as \\xe9."""
    return path.name.encode("utf-8", "surrogateescape" if _is_of_bytes(path.name) else "replace").decode(
        "utf-8", "backslashreplace"
    )


def require_utf8(path: Path, who: str) -> None:
    """Raise UsageError for a path that is not UTF-8, for `who` that takes no other."""
    if not is_utf8(path):
        raise UsageError(f"{path}: is not UTF-8, and {who} takes no such path; rename it")


def is_utf8(path: Path) -> bool:
    """Return whether all bytes of a path are UTF-8, as libraries that are not Python's ask for."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_of_bytes(text: str) -> bool:
    """Return whether `text` can be a path: its lone surrogates stand for bytes."""
    return not any("\ud800" <= c <= "\udfff" and not "\udc80" <= c <= "\udcff" for c in text)


def _write_bytes(exc: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(exc, UnicodeEncodeError):
        raise exc
    text = exc.object[exc.start : exc.end]
    parts = (
        bytes([ord(c) - 0xDC00]) if "\udc80" <= c <= "\udcff" else c.encode("ascii", "backslashreplace") for c in text
    )
    return b"".join(parts), exc.end


codecs.register_error(OUTPUT_ERRORS, _write_bytes)
