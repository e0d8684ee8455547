"""The two 8-bit formats: int8, and FP8 with four bits of exponent and three of mantissa (arXiv 2209.05433)."""

__all__ = ["FORMATS", "Format", "Scheme", "activation_scale", "quantize_weight", "unsigned_scale"]

from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

Scheme = Literal["int8", "fp8"]
# Below 2**-14 the numbers of fp16 are multiples of 2**-24, which round a scale smaller than this one by more than 3 %.
_LEAST_SCALE = 2.0**-20
# A bias is stored as int32 in units of the product of both scales; this leaves a factor of two to int32's range.
_MOST_BIAS = 2.0**30


@dataclass(frozen=True)
class Format:
    """An 8-bit format: its type in ONNX and in torch, and its largest number."""

    onnx: ir.DataType
    torch: torch.dtype
    largest: float


FORMATS: dict[Scheme, Format] = {
    "int8": Format(ir.DataType.INT8, torch.int8, 127.0),
    "fp8": Format(ir.DataType.FLOAT8E4M3FN, torch.float8_e4m3fn, 448.0),
}


def quantize_weight(
    weight: torch.Tensor, axis: int, scheme: Scheme, bias: NDArray[np.float32] | None = None, source: float = 1.0
) -> tuple[torch.Tensor, NDArray[np.float32]]:
    """Return `weight` in 8 bits, of the same shape, and its scale per output channel, which lies on `axis`.

    A scale is a number of fp16, rounded up, so that fp16 and fp32 graphs share it and no weight is cut off. It is large
    enough for `bias` to fit int32 in units of the weight's scale times the input's, `source`.
    """
    form, wide = FORMATS[scheme], weight.float()
    channels = wide.movedim(axis, 0).reshape(wide.shape[axis], -1)
    least = channels.abs().amax(dim=1).numpy().astype(np.float64) / form.largest
    if bias is not None:
        least = np.maximum(least, np.abs(bias) / (source * _MOST_BIAS))
    scales = _rounded_up(np.maximum(least, _LEAST_SCALE))
    shape = [1] * wide.dim()
    shape[axis] = -1
    scaled = wide / torch.from_numpy(scales).reshape(shape)
    if scheme == "int8":
        scaled = scaled.round()
    return scaled.clamp(-form.largest, form.largest).to(form.torch), scales


def activation_scale(span: tuple[float, float], scheme: Scheme) -> np.float32:
    """Return the scale of a symmetric format for numbers within `span`; a number of fp16."""
    largest = max(abs(span[0]), abs(span[1]))
    return np.float32(_rounded_up(np.array([max(largest / FORMATS[scheme].largest, _LEAST_SCALE)]))[0])


def unsigned_scale(span: tuple[float, float]) -> tuple[np.float32, int]:
    """Return the scale and the zero point of uint8 for numbers within `span`; zero is represented exactly."""
    low, high = min(span[0], 0.0), max(span[1], 0.0)
    scale = max((high - low) / 255, _LEAST_SCALE)
    return np.float32(scale), int(np.clip(np.round(-low / scale), 0, 255))


def _rounded_up(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return positive numbers rounded up to numbers of fp16, as fp32."""
    near = values.astype(np.float16)
    up = np.where(near.astype(np.float64) < values, np.nextafter(near, np.float16(np.inf)), near)
    return up.astype(np.float32)
