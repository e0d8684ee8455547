"""The memory of each loaded component of a bundle: weights, activations, inputs and outputs, in bytes."""

__all__ = ["Need", "exact_sizes", "host_need", "need_of", "on_device", "shares_activations"]

import math
import re
from collections.abc import Iterable, Mapping

from sdxl_trt.engines.bundle import (
    Component,
    DType,
    Manifest,
    Natural,
    PlanRecord,
    Profile,
    Range,
    Record,
    TensorSpec,
    fixed,
)
from sdxl_trt.engines.plans import TOKENS, Sizes, axes_of, component_profiles
from sdxl_trt.engines.residency.activations import estimate_activations, estimate_error, largest_axes, score_bytes

_ITEM: dict[DType, int] = {"float32": 4, "float16": 2, "int64": 8}
# ONNX Runtime's CPU provider computes in fp32: it keeps fp16 weights, their fp32 casts and packed copies.
# Estimates from loading a 50 M-parameter UNet: 1.4 times the fp32 weights in fp32, 1.9 times in fp16.
_FP32_BYTES = 4
_ORT_WEIGHTS = {"fp32": 1.5, "fp16": 2.0, "bf16": 2.0, "mixed": 2.0}
_ORT_ERROR = 0.3
# Nearly all weights of a UNet belong to convolutions and matrix products, which can be streamed.
_STREAMABLE = 0.9
_PLAN_ERROR = 0.03


class Need(Record, frozen=True, kw_only=True):
    """Bytes that a loaded component needs for its largest input sizes.

    `io` is its input and output buffers, `streamable` the part of `weights` that may stay in host memory. `uncertain`
    is the error of the sum in either direction: 0 if the figures are the builder's own.
    """

    component: str
    weights: Natural
    activations: Natural
    io: Natural
    streamable: Natural = 0
    uncertain: Natural = 0


def on_device(provider: str) -> bool:
    """Return whether the engines of `provider` use device memory instead of host memory."""
    return provider != "ort-cpu"


def shares_activations(provider: str) -> bool:
    """Return whether all engines share one block of activations; ONNX Runtime's sessions have one each."""
    return not provider.startswith("ort-")


def exact_sizes(height: int, width: int) -> Sizes:
    """Return the sizes of a request for one picture of `height` × `width` pixels, with a prompt of TOKENS."""
    return Sizes(height=fixed(height), width=fixed(width), batch=fixed(1), tokens=fixed(TOKENS), static=True)


def need_of(manifest: Manifest, name: str, provider: str, sizes: Sizes, record: PlanRecord | None = None) -> Need:
    """Return the memory of component `name`: as stated in its plan's `record`, else estimated for `sizes`."""
    component = manifest.components[name]
    if record is not None:
        measured = record.memory
        return Need(
            component=name,
            weights=measured.weights,
            activations=measured.activations,
            io=_io_bytes(component, record.key.profiles),
            streamable=measured.streamable,
        )
    # Only plans use tiles: ONNX Runtime decodes a picture whole.
    precision = component.precision if shares_activations(provider) else "fp16"
    profiles = _profiles(component, axes_of(component.kind, precision, sizes, manifest.base.vae.factor))
    io = _io_bytes(component, profiles)
    if not shares_activations(provider):
        return _onnxruntime_need(name, component, provider, profiles, io)
    weights, activations = component.weights.size, estimate_activations(component, profiles)
    return Need(
        component=name,
        weights=weights,
        activations=activations,
        io=io,
        streamable=int(weights * _STREAMABLE) if component.kind == "unet" else 0,
        uncertain=int(activations * estimate_error(component) + weights * _PLAN_ERROR),
    )


def _onnxruntime_need(name: str, component: Component, provider: str, profiles: tuple[Profile, ...], io: int) -> Need:
    device = on_device(provider)
    precision = component.precision if device else "fp32"
    weights = component.weights.size if device else host_need(component)
    activations = estimate_activations(component, profiles, precision)
    if provider != "ort-tensorrt":
        activations += score_bytes(component, profiles, precision)
    uncertain = int((weights + activations) * _ORT_ERROR)
    return Need(component=name, weights=weights, activations=activations, io=io, uncertain=uncertain)


def host_need(component: Component) -> int:
    """Return an estimate, in bytes, of a component's weights in host memory on ONNX Runtime's CPU provider."""
    return int(component.parameters * _FP32_BYTES * _ORT_WEIGHTS[component.precision])


def _profiles(component: Component, axes: list[dict[str, Range]]) -> tuple[Profile, ...]:
    return component_profiles({spec.name: spec.shape for spec in component.inputs}, axes)


def _io_bytes(component: Component, profiles: Iterable[Profile]) -> int:
    """Return the bytes of a component's inputs and outputs at the largest shapes of any profile."""
    return max((_io_at(component, largest_axes(component, profile)) for profile in profiles), default=0)


def _io_at(component: Component, axes: Mapping[str, int]) -> int:
    return sum(_bytes(spec, axes) for spec in (*component.inputs, *component.outputs))


def _bytes(spec: TensorSpec, axes: Mapping[str, int]) -> int:
    return math.prod(_size(axis, axes) for axis in spec.shape) * _ITEM[spec.dtype]


def _size(axis: int | str, axes: Mapping[str, int]) -> int:
    """Return the size of an axis that is a number, a name, or a multiple of one: "8*height", "height/8"."""
    if isinstance(axis, int):
        return axis
    found = re.fullmatch(r"(?:(\d+)\*)?(\w+?)(?:/(\d+))?", axis)
    if found is None or found[2] not in axes:
        return 1
    return axes[found[2]] * int(found[1] or 1) // int(found[3] or 1)
