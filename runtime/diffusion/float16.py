"""float16 to float32 and back, bit for bit as numpy converts them, but vectorized: numpy converts them one by one.

Both have a sign, an exponent and a fraction; float32 has 13 more fraction bits, and its exponent bias is 112 higher.
"""

__all__ = ["to_float32", "write_float16"]

import numpy as np
from numpy.typing import NDArray

_FRACTION = 13
_SHIFT = 112
_SIGN_AND_REST = np.int32(-(1 << 31) | (1 << 28) - (1 << _FRACTION))
_MAGNITUDE = np.int32((1 << 31) - 1)
_SIGN = np.int32(-(1 << 15))
_UP = np.int32((1 << _FRACTION - 1) - 1 - (_SHIFT << 23))
_LOWEST, _HIGHEST = np.array([2.0**-14, 65520.0], np.float32).view(np.int32)
"""As bits: below the first a float16 is subnormal, from the second on it is infinite."""
_OVERFLOW = np.float32(65536.0)


def to_float32(halves: NDArray[np.float16]) -> NDArray[np.float32]:
    """Return a new array of the same values."""
    bits = np.ascontiguousarray(halves).view(np.int16).astype(np.int32)
    bits <<= _FRACTION
    bits &= _SIGN_AND_REST
    values: NDArray[np.float32] = bits.view(np.float32)
    values *= np.float32(2.0**_SHIFT)
    if values.size and (values.max() >= _OVERFLOW or values.min() <= -_OVERFLOW):
        return halves.astype(np.float32)  # the bits above turn infinity and NaN into finite numbers
    return values


def write_float16(values: NDArray[np.float32], out: NDArray[np.float16]) -> None:
    """Write `values` to `out`, rounded to nearest; both are contiguous and have the same shape."""
    bits = values.view(np.int32)
    magnitude = bits & _MAGNITUDE
    if not values.size or magnitude.max() >= _HIGHEST:
        np.copyto(out, values, casting="same_kind")
        return
    rounded = magnitude >> _FRACTION
    rounded &= 1  # a tie rounds to even
    rounded += magnitude
    rounded += _UP
    rounded >>= _FRACTION
    signs = bits >> 16
    signs &= _SIGN
    rounded |= signs
    np.copyto(out.view(np.int16), rounded, casting="same_kind")
    few = np.flatnonzero(magnitude < _LOWEST)
    out.reshape(-1)[few] = values.reshape(-1)[few]
