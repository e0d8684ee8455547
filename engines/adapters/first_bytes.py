"""Recognize by its first bytes a file that is named .safetensors but has another format."""

__all__ = ["PICKLED", "check_first_bytes", "explain_damage", "is_safetensors"]

import json
import os
import re
from pathlib import Path

from sdxl_trt.engines.errors import CorruptError, SourceError, explain_os_error

PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
"""Extensions of pickled weights, which can run code when loaded."""
_READ = 512
# safetensors' own limit for the length of a header.
_MAX_HEADER = 100_000_000
_PICKLED = "is pickled, which can run code when loaded; get the model as .safetensors"
_FETCH = "run 'git lfs pull' in its folder, or download the file itself"
_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|body|\?xml|!--)", re.IGNORECASE)
_STARTS: tuple[tuple[bytes, str], ...] = (
    (b"GGUF", "is a GGUF file, quantized weights for other programs; get the model as .safetensors"),
    (b"version https://git-lfs", f"is a git-lfs pointer, the placeholder of a file; {_FETCH}"),
    (b"PK\x03\x04", f"is a zip archive, like PyTorch's .ckpt and .pt files: it {_PICKLED}"),
    (b"Rar!", "is a RAR archive; unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive; unpack it"),
    (b"\x1f\x8b", "is a gzip archive; unpack it"),
    (b"\x89HDF", "is an HDF5 file; get the model as .safetensors"),
)  # fmt: skip


def check_first_bytes(path: Path) -> None:
    """Raise SourceError, naming the format, if the file is clearly not safetensors; CorruptError if it is empty.

    A file of no known format passes: safetensors reports what is wrong with it.
    """
    start, size = _start(path)
    if size == 0:
        raise CorruptError(f"{path}: broken safetensors (the file is empty); download it again")
    if is_safetensors(path):  # the length of a header may look like any of the magic numbers below
        return
    for magic, what in _STARTS:
        if start.startswith(magic):
            raise SourceError(f"{path}: {what}")
    if re.match(rb"\x80[\x02-\x05]", start):
        raise SourceError(f"{path}: {_PICKLED}")
    if _PAGE.match(start):
        raise SourceError(f"{path}: is a web page, probably one that asks you to log in or to accept a licence; do so,"
                          " and download the file again")  # fmt: skip
    if b"\0" not in start and start.lstrip().startswith((b"{", b"[")):
        raise SourceError(f"{path}: is JSON text, probably an error message from the site; download the file again")


def is_safetensors(path: Path) -> bool:
    """Return whether a file begins like safetensors: with the length of a header, and the header's opening brace."""
    start, size = _start(path)
    length = int.from_bytes(start[:8], "little")
    return len(start) > 8 and 2 <= length <= min(_MAX_HEADER, size - 8) and start[8:9] == b"{"


def explain_damage(path: Path, exc: Exception) -> CorruptError:
    """Return the error for a file that safetensors refused; for a truncated file, it states how much is missing."""
    reason = str(exc)
    try:
        size = path.stat().st_size
        whole = _whole_size(path)
        if whole is not None and size < whole:
            reason = f"truncated: it has {size} of {whole} bytes"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass  # keep the library's own message
    return CorruptError(f"{path}: broken safetensors ({reason}); download it again")


def _whole_size(path: Path) -> int | None:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= _MAX_HEADER:
            return None
        header = file.read(length)
    if len(header) < length:
        return 8 + length if header[:1] == b"{" else None
    entries = json.loads(header)
    ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
    return 8 + length + max(ends, default=0)


def _start(path: Path) -> tuple[bytes, int]:
    try:
        with path.open("rb") as file:
            return file.read(_READ), os.fstat(file.fileno()).st_size
    except OSError as exc:
        raise explain_os_error(exc, f"reading {path}") from exc
