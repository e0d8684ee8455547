"""Paths and messages of any bytes as text: in commands to type, in records, and on outputs.

In a Python str, a byte of a path that is not UTF-8 is a lone surrogate, U+DC80 to U+DCFF, which no codec encodes.
"""

__all__ = ["OUTPUT_ERRORS", "is_utf8", "known_as", "one_line", "refused_by_windows", "require_utf8", "shell_word"]

import codecs
from pathlib import Path

from sdxl_trt.engines.errors import UsageError

OUTPUT_ERRORS = "sdxl-trt-output"
"""Error handler for text outputs: writes such a byte unchanged, and an escape for what the encoding lacks."""
_DEVICES = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"} | {
    f"{port}{number}" for port in ("COM", "LPT") for number in "123456789¹²³"
}
_PLAIN = set(range(0x21, 0x7F)) - set(b"'\\")


def shell_word(value: Path | str) -> str:
    """Return `value` quoted as one shell word, on one line and printable in any encoding.

    Quotes only if necessary; unprintable text is written as ``$'\\xe9'``, for bash, zsh and POSIX 2024.
    """
    text = str(value)
    # Messages collapse runs of spaces.
    if text.isprintable() and "  " not in text:
        import shlex  # noqa: PLC0415 - --help quotes nothing

        return shlex.quote(text)
    content = text.encode("utf-8", "surrogateescape" if _can_be_path(text) else "replace")
    return "$'" + "".join(chr(byte) if byte in _PLAIN else f"\\x{byte:02x}" for byte in content) + "'"


def one_line(message: str) -> str:
    """Return `message` on one line without control characters: it may quote what nobody has vouched for.

    Bytes of a path that are no UTF-8 are shown as escapes (``\\xe9``).
    """
    return " ".join("".join(c if c.isprintable() else _shown(c) for c in message).split())


def _shown(c: str) -> str:
    return f"\\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff" else " "


def known_as(path: Path) -> str:
    """Return the last part of a path for a record in UTF-8; other bytes become escapes (``\\xe9``)."""
    return path.name.encode("utf-8", "surrogateescape" if _can_be_path(path.name) else "replace").decode(
        "utf-8", "backslashreplace"
    )


def require_utf8(path: Path, who: str) -> None:
    """Raise UsageError if `path` is not UTF-8; the message names `who`, which accepts only UTF-8."""
    if not is_utf8(path):
        raise UsageError(f"{path}: is not UTF-8, and {who} cannot open such a path; rename it")


def is_utf8(path: Path) -> bool:
    """Return whether all bytes of a path are UTF-8, as native libraries require."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def refused_by_windows(name: str) -> bool:
    """Return whether `name`, one part of a path, cannot be the name of a file or folder on Windows.

    Windows refuses some characters, cuts dots and spaces at the end, and takes the names of devices, with any ending,
    for the device; a colon would write into a hidden stream of another file.
    """
    device = name.partition(".")[0].rstrip(" ").upper() in _DEVICES
    return device or name.endswith((" ", ".")) or any(c in '<>:"/\\|?*' or c < " " for c in name)


def _can_be_path(text: str) -> bool:
    """Return whether `text` can be a path: every lone surrogate in it encodes a byte."""
    return not any("\ud800" <= c <= "\udfff" and not "\udc80" <= c <= "\udcff" for c in text)


def _encode_path_bytes(exc: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(exc, UnicodeEncodeError):
        raise exc
    text = exc.object[exc.start : exc.end]
    parts = (
        bytes([ord(c) - 0xDC00]) if "\udc80" <= c <= "\udcff" else c.encode("ascii", "backslashreplace") for c in text
    )
    return b"".join(parts), exc.end


codecs.register_error(OUTPUT_ERRORS, _encode_path_bytes)
