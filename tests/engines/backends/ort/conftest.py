"""A writer of ELF libraries that have nothing but NEEDED entries: enough for what reads them, not for a loader."""

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

_ADDRESS = 0x4000
"""Where the segment lies in memory, unlike in the file."""


def _write_library(path: Path, *needed: str) -> Path:
    strings = b"\0" + b"".join(name.encode() + b"\0" for name in needed)
    starts = [strings.index(b"\0" + name.encode() + b"\0") + 1 for name in needed]
    head = 64 + 2 * 56
    entries = [(1, start) for start in starts] + [(5, _ADDRESS + head), (10, len(strings)), (0, 0)]
    dynamic = b"".join(struct.pack("<qQ", *entry) for entry in entries)
    size = head + len(strings) + len(dynamic)
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 5, 0, _ADDRESS, _ADDRESS, size, size, 0x1000)
    where = head + len(strings)
    last = struct.pack("<IIQQQQQQ", 2, 6, where, _ADDRESS + where, _ADDRESS + where, len(dynamic), len(dynamic), 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + load + last + strings + dynamic)
    return path


@pytest.fixture(scope="session")
def write_library() -> Callable[..., Path]:
    """Return a function that writes a library at a path, with the NEEDED entries given, and returns the path."""
    return _write_library
