"""Shared libraries: which ones a library needs, and whether the loader finds them."""

__all__ = ["load_problem", "needed_libraries"]

import ctypes
import mmap
import struct
from pathlib import Path

_ELF_64_LITTLE = b"\x7fELF\x02\x01"
_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NULL, _DT_NEEDED, _DT_STRTAB = 0, 1, 5


def needed_libraries(path: Path) -> list[str]:
    """Return the names in the NEEDED entries of the ELF library at `path`, in order; nothing is loaded.

    Raises OSError if it cannot be read, ValueError if it is not a 64-bit little-endian ELF library.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as elf:
        if elf[:6] != _ELF_64_LITTLE:
            raise ValueError(f"{path}: not a 64-bit ELF library")
        try:
            return _needed(elf)
        except (struct.error, StopIteration, IndexError) as exc:
            raise ValueError(f"{path}: broken ELF header") from exc


def _needed(elf: mmap.mmap) -> list[str]:
    (start,) = struct.unpack_from("<Q", elf, 32)
    size, count = struct.unpack_from("<HH", elf, 54)
    # Type, flags, offset, address, physical address, size in the file.
    segments = [struct.unpack_from("<IIQQQQ", elf, start + index * size) for index in range(count)]
    _, _, offset, _, _, length = next(each for each in segments if each[0] == _PT_DYNAMIC)
    entries = []
    for tag, value in struct.iter_unpack("<qQ", elf[offset : offset + length]):
        if tag == _DT_NULL:
            break
        entries.append((tag, value))
    table = next(value for tag, value in entries if tag == _DT_STRTAB)
    _, _, offset, address, _, _ = next(
        each for each in segments if each[0] == _PT_LOAD and each[3] <= table < each[3] + each[5]
    )
    return [_text(elf, table - address + offset + value) for tag, value in entries if tag == _DT_NEEDED]


def _text(elf: mmap.mmap, start: int) -> str:
    return elf[start : elf.find(b"\0", start)].decode()


def load_problem(name: str) -> str | None:
    """Load the library `name`; return why it does not load, as part of a line, or None if it does."""
    try:
        ctypes.CDLL(name)
    except OSError as exc:
        # glibc names the file that it misses, which may be one that `name` needs.
        missing, _, rest = str(exc).partition(": ")
        if rest.startswith("cannot open shared object file"):
            return f"{missing} is missing" if missing == name else f"{missing} is missing, which {name} needs"
        return f"{name} does not load ({' '.join(str(exc).split())})"
    return None
