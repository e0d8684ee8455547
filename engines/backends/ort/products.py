"""Whether this machine multiplies unsigned by signed 8-bit integers exactly.

x86 processors without VNNI instructions add pairs of such products in 16 bits, which saturate without a word: on the
50 M cousin a step was 37 dB from fp32 instead of 43. ONNX Runtime has other kernels for them, exact and slower. On a
processor with VNNI or AMX these cost as much as fp32 (1.0 of its time instead of 0.55), so that the machine is asked.
"""

__all__ = ["EXACT_PRODUCTS", "saturates"]

from functools import cache
from typing import Any

import numpy as np

EXACT_PRODUCTS = "session.x64quantprecision"
"""The entry of a session's configuration that chooses exact kernels, with the value "1"."""
_INNER, _OUTER = 64, 16


@cache
def saturates(ort: Any) -> bool:
    """Return whether the usual 8-bit kernels of the module `ort`, ONNX Runtime, saturate here: one small product tells.

    Every product is 255 · 127: two of them are beyond int16.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(_graph(), options, providers=["CPUExecutionProvider"])
    largest = np.full((_OUTER, _INNER), 255, np.uint8)
    (found,) = session.run(None, {"a": largest})
    return bool((found != 255 * 127 * _INNER).any())


def _graph() -> bytes:
    """Return a model, y = MatMulInteger(a, b) with a constant b of 127s, in ONNX's wire format.

    The package `onnx` is not needed to run graphs, so it is not imported for these hundred bytes.
    """
    weight = (_field(1, _INNER) + _field(1, _OUTER) + _field(2, _INT8)
              + _text(8, "b") + _bytes(9, bytes([127]) * (_INNER * _OUTER)))  # fmt: skip
    node = _text(1, "a") + _text(1, "b") + _text(2, "y") + _text(4, "MatMulInteger")
    graph = (_bytes(1, node) + _text(2, "products") + _bytes(5, weight)
             + _bytes(11, _value("a", _UINT8, _INNER)) + _bytes(12, _value("y", _INT32, _OUTER)))  # fmt: skip
    return _field(1, 8) + _bytes(7, graph) + _bytes(8, _field(2, 13))


_UINT8, _INT8, _INT32 = 2, 3, 6  # onnx.TensorProto's


def _value(name: str, dtype: int, width: int) -> bytes:
    sizes = b"".join(_bytes(1, _field(1, size)) for size in (_OUTER, width))
    return _text(1, name) + _bytes(2, _bytes(1, _field(1, dtype) + _bytes(2, sizes)))


def _field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _text(number: int, text: str) -> bytes:
    return _bytes(number, text.encode())


def _bytes(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low]) if not rest else bytes([low | 0x80]) + _varint(rest)
