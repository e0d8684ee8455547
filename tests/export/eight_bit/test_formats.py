"""int8, uint8 and FP8: no number is cut off, zero is exact, scales are numbers of fp16, biases fit int32."""

from typing import Any, Literal

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sdxl_trt.export.eight_bit.formats import activation_scale, quantize_weight, unsigned_scale

Scheme = Literal["int8", "fp8"]
LARGEST = {"int8": 127.0, "fp8": 448.0}
NUMBERS = st.floats(-(2.0**15), 2.0**15, width=32)
WEIGHTS = arrays.arrays(np.float32, (3, 4, 2), elements=NUMBERS)
SPANS = st.tuples(NUMBERS, NUMBERS).map(lambda pair: (min(pair), max(pair)))
schemes = pytest.mark.parametrize("scheme", ["int8", "fp8"])


def _ml_dtypes(narrow: torch.Tensor) -> Any:
    """Return 8-bit numbers as numpy knows them, by their bits."""
    dtype = np.int8 if narrow.dtype == torch.int8 else ml_dtypes.float8_e4m3fn
    return narrow.view(torch.uint8).numpy().view(dtype)


@schemes
@pytest.mark.parametrize("axis", [0, 1, 2])
@settings(max_examples=30)
@given(weight=WEIGHTS)
@example(weight=np.zeros((3, 4, 2), np.float32))
@example(weight=np.full((3, 4, 2), 1e-30, np.float32))
def test_weights_are_rounded_per_output_channel_and_never_cut_off(scheme: Scheme, axis: int, weight: Any) -> None:
    narrow, scales = quantize_weight(torch.from_numpy(weight), axis, scheme)
    assert narrow.shape == weight.shape
    assert np.array_equal(scales, scales.astype(np.float16).astype(np.float32))  # numbers of fp16
    assert (scales > 0).all()
    shape = [1, 1, 1]
    shape[axis] = -1
    exact = weight.astype(np.float64) / scales.astype(np.float64).reshape(shape)
    assert np.abs(exact).max() <= LARGEST[scheme]
    found = _ml_dtypes(narrow)
    if scheme == "int8":
        assert np.abs(found - exact).max() <= 0.5 + 1e-4  # torch divides in fp32
        assert found.min() >= -127  # symmetric: -128 is not used
    else:
        expected = (weight / scales.reshape(shape)).astype(ml_dtypes.float8_e4m3fn)
        assert np.array_equal(found.view(np.uint8), expected.view(np.uint8))


@given(
    weight=arrays.arrays(np.float32, (3, 4), elements=NUMBERS),
    bias=arrays.arrays(np.float32, 3, elements=st.floats(-1e4, 1e4, width=32)),
    source=st.floats(2.0**-20, 100, width=32),
)
@example(weight=np.zeros((3, 4), np.float32), bias=np.full(3, 1e4, np.float32), source=2.0**-20)
def test_a_scale_is_large_enough_for_its_bias_in_int32(weight: Any, bias: Any, source: float) -> None:
    _, scales = quantize_weight(torch.from_numpy(weight), 0, "int8", bias, source)
    steps = np.abs(bias / (scales.astype(np.float64) * source))
    assert steps.max() < 2**31


@schemes
@settings(max_examples=50)
@given(span=SPANS)
@example(span=(0.0, 0.0))
@example(span=(-(2.0**15), 0.0))
def test_activations_within_a_range_are_not_cut_off(scheme: Scheme, span: tuple[float, float]) -> None:
    scale = activation_scale(span, scheme)
    assert scale > 0
    assert np.float32(np.float16(scale)) == scale
    assert max(map(abs, span)) / float(scale) <= LARGEST[scheme]
    assert float(scale) <= max(max(map(abs, span)) / LARGEST[scheme] * (1 + 2**-4), 2.0**-20)  # and not wider


@settings(max_examples=50)
@given(span=SPANS)
@example(span=(0.0, 0.0))
@example(span=(3.0, 5.0))
@example(span=(-5.0, -3.0))
def test_uint8_represents_zero_exactly_and_all_numbers_within_half_a_step(span: tuple[float, float]) -> None:
    scale, zero = unsigned_scale(span)
    assert 0 <= zero <= 255
    for value in (*span, 0.0):
        narrow = np.clip(np.round(value / float(scale)) + zero, 0, 255)
        error = abs((narrow - zero) * float(scale) - value)
        assert error <= float(scale) * (0.5 + 1e-5)
    assert (np.round(0.0) + zero - zero) * scale == 0.0
