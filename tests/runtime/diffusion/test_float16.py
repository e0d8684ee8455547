"""float16 conversions against numpy's own, which are correct but slow."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sdxl_trt.runtime.diffusion.float16 import to_float32, write_float16

EVERY = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
FINITE = EVERY[np.isfinite(EVERY)]


def _bits(values: np.ndarray) -> np.ndarray:
    return values.view({2: np.uint16, 4: np.uint32}[values.itemsize])


def _written(values: np.ndarray) -> np.ndarray:
    out = np.full(values.shape, 7, np.float16)
    write_float16(values, out)
    return out


def test_every_float16_converts_to_the_right_float32() -> None:
    np.testing.assert_array_equal(_bits(to_float32(FINITE)), _bits(FINITE.astype(np.float32)))
    np.testing.assert_array_equal(to_float32(EVERY), EVERY.astype(np.float32))


def test_every_float16_survives_a_round_trip() -> None:
    np.testing.assert_array_equal(_bits(_written(FINITE.astype(np.float32))), _bits(FINITE))


@pytest.mark.parametrize("places", [-2, -1, 0, 1, 2])
def test_values_between_two_float16_are_rounded_as_in_numpy(places: int) -> None:
    """The midpoints themselves, and their float32 neighbours."""
    rising = np.sort(FINITE.astype(np.float64))
    middles = ((rising[1:] + rising[:-1]) / 2).astype(np.float32)
    values = (middles.view(np.int32) + places).view(np.float32)
    np.testing.assert_array_equal(_bits(_written(values)), _bits(values.astype(np.float16)))


@given(arrays.arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32, allow_nan=False)))
def test_any_float32_is_rounded_as_in_numpy(values: np.ndarray) -> None:
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(_bits(_written(values)), _bits(values.astype(np.float16)))


def test_nan_and_infinity_are_kept() -> None:
    for value in (np.nan, np.inf, -np.inf):
        values = np.array([1.0, value, -0.0], np.float32)
        np.testing.assert_array_equal(_written(values), values.astype(np.float16))
        np.testing.assert_array_equal(to_float32(values.astype(np.float16)), values)


def test_shapes_and_views_are_kept() -> None:
    halves = np.arange(48, dtype=np.float16).reshape(2, 2, 3, 4)
    for part in (halves, halves[:, :1], halves[..., ::2]):
        found = to_float32(part)
        np.testing.assert_array_equal(found, part.astype(np.float32))
        assert not np.shares_memory(found, halves)
    _ = write_float16(np.full((1, 2, 3, 4), -0.5, np.float32), halves[1:])
    assert (halves[1] == -0.5).all()
    assert halves[0].max() == 23
