"""A graph's external weights as addresses in this process, so that OpenVINO opens no file.

OpenVINO opens the file that a tensor names. It takes an address instead where the location has the name that ONNX
Runtime's own OpenVINO provider gives it. An address is read unchecked: what it covers is checked here.
The graph is read and written in protobuf's wire format: the package `onnx` is not needed to run graphs.
"""

__all__ = ["place_weights"]

import math
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import NamedTuple

from sdxl_trt.engines.errors import CorruptError

_IN_MEMORY = b"*/_ORT_MEM_ADDR_/*"
# Fields of onnx.proto that lead to a tensor, by message: {number: the message in it}.
_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_DIMS, _TYPE, _EXTERNAL, _LOCATION = 1, 2, 13, 14  # TensorProto's
_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2, 17: 1, 18: 1, 19: 1, 20: 1}
_VARINT, _FIXED_64, _LENGTH, _FIXED_32 = 0, 1, 2, 5
_DEEPEST = 32


class _Field(NamedTuple):
    """One field of a message: its number, its bytes with their tag, its number or the span of its content."""

    number: int
    whole: memoryview
    value: int
    content: memoryview


class _Place(NamedTuple):
    file: str
    address: int
    size: int


def place_weights(graph: bytes, file: str, address: int, size: int) -> bytes:
    """Return `graph` with every tensor of the weights file `file` as its address: the file is mapped at `address`.

    `size` is the map's, in bytes. Raises CorruptError for a tensor in another file, outside of the map or not as long
    as its shape, and for what is no graph.
    """
    try:
        return _placed("model", memoryview(graph), _Place(PurePosixPath(file).name, address, size), 0)
    except (IndexError, ValueError) as exc:
        raise CorruptError(f"the graph beside {file} is damaged ({exc}); get an intact copy of the bundle") from exc


def _placed(message: str, data: memoryview, place: _Place, depth: int) -> bytes:
    """Return a message with its tensors placed."""
    if depth > _DEEPEST:
        raise ValueError("graphs nested too deeply")
    if message == "tensor":
        return _placed_tensor(data, place)
    inner = _FIELDS[message]
    parts: list[bytes | memoryview] = []
    for field in _fields(data):
        kind = inner.get(field.number)
        if kind is None:
            parts.append(field.whole)
        else:
            parts.append(_bytes(field.number, _placed(kind, field.content, place, depth + 1)))
    return b"".join(parts)


def _placed_tensor(data: memoryview, place: _Place) -> bytes:
    fields = list(_fields(data))
    entries = dict(_entry(field.content) for field in fields if field.number == _EXTERNAL)
    if not entries and not any(field.number == _LOCATION and field.value for field in fields):
        return bytes(data)
    if entries.get("location") != place.file:
        raise ValueError(f"a tensor in the file {entries.get('location', '')[:80]!r}")
    offset, length = int(entries.get("offset", "0")), int(entries.get("length", "-1"))
    if length != _nbytes(fields) or not 0 <= offset <= place.size - length:
        raise ValueError(f"a tensor of {length} bytes at {offset} of {place.size}")
    kept = b"".join(field.whole for field in fields if field.number != _EXTERNAL)
    settings = {b"location": _IN_MEMORY, b"offset": b"%d" % (place.address + offset), b"length": b"%d" % length}
    return kept + b"".join(_bytes(_EXTERNAL, _bytes(1, key) + _bytes(2, value)) for key, value in settings.items())


def _nbytes(fields: list[_Field]) -> int:
    """Return the bytes of a tensor by its type and dimensions, which are packed or one a field."""
    dims: list[int] = []
    item = 0
    for field in fields:
        if field.number == _TYPE:
            item = _BYTES.get(field.value, 0)
        elif field.number == _DIMS:
            dims += _varints(field.content) if field.content else [field.value]
    if not item:
        raise ValueError("a tensor of an unknown type")
    return item * math.prod(dims)


def _entry(data: memoryview) -> tuple[str, str]:
    texts = {field.number: bytes(field.content).decode() for field in _fields(data)}
    return texts.get(1, ""), texts.get(2, "")


def _fields(data: memoryview) -> Iterator[_Field]:
    start, end = 0, len(data)
    while start < end:
        tag, at = _varint(data, start)
        number, wire = tag >> 3, tag & 7
        value, content = 0, data[:0]
        if wire == _VARINT:
            value, at = _varint(data, at)
        elif wire == _LENGTH:
            length, at = _varint(data, at)
            content, at = data[at : at + length], at + length
        elif wire in (_FIXED_32, _FIXED_64):
            at += 4 if wire == _FIXED_32 else 8
        else:
            raise ValueError(f"wire type {wire}")
        if at > end:
            raise ValueError("it ends within a field")
        yield _Field(number, data[start:at], value, content)
        start = at


def _varints(data: memoryview) -> list[int]:
    values, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        values.append(value)
    return values


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _bytes(number: int, content: bytes) -> bytes:
    return _written(number << 3 | _LENGTH) + _written(len(content)) + content


def _written(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
