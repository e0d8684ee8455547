"""The memory of each loaded component of a bundle: weights, activations, inputs and outputs, in bytes."""

__all__ = ["Extent", "Need", "exact_sizes", "host_need", "need_of", "on_device", "shares_activations"]

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from msgspec.structs import replace

from sdxl_trt.engines.bundle import (
    Component,
    DType,
    Manifest,
    Natural,
    PlanRecord,
    Precision,
    Profile,
    Range,
    Record,
    TensorSpec,
    axis_size,
    fixed,
)
from sdxl_trt.engines.plans import (
    TOKENS,
    RunSizes,
    Sizes,
    axes_of,
    component_profiles,
    profile_for_run,
    usual_profile,
)
from sdxl_trt.engines.residency.activations import (
    estimate_activations,
    estimate_each,
    estimate_error,
    largest_axes,
    score_bytes,
)

_ITEM: dict[DType, int] = {"float32": 4, "float16": 2, "int64": 8}
# ONNX Runtime's CPU provider computes in fp32: it keeps fp16 weights, their fp32 casts and packed copies.
# Estimates from loading a 50 M-parameter UNet: 1.4 times the fp32 weights in fp32, 1.9 times in fp16.
_FP32_BYTES = 4
# An int8 session of the same UNet takes 199 MB with its activations, of which the fp32 one has 62 MB: 2.7 bytes a
# parameter, its packed weights twice and the floats of other layers. fp8 is a simulation, whose weights become fp32.
_ORT_WEIGHTS: dict[Precision, float] = {"fp32": 1.5, "fp16": 2.0, "bf16": 2.0, "mixed": 2.0, "int8": 0.7, "fp8": 1.5}
# OpenVINO keeps the fp32 casts of the weights beside the packed copies of those in use: 2.8 times the fp32 weights of
# the same UNet in fp32 and in bf16.
_OPENVINO_WEIGHTS = 2.8
_ORT_ERROR = 0.3
# Nearly all weights of a UNet belong to convolutions and matrix products, which can be streamed.
_STREAMABLE = 0.9
_PLAN_ERROR = 0.03
Extent = Literal["usual", "least", "largest"]
"""Which profile of a plan counts: that of ordinary runs, or the one with the least or the most activations."""


class Need(Record, frozen=True, kw_only=True):
    """Bytes that a loaded component needs in a run, which uses one of its profiles.

    `io` is its input and output buffers, `streamable` the part of `weights` that may stay in host memory, and `largest`
    the activations of the profile that needs most. `uncertain` is the error of the sum of the others in either
    direction: 0 if the figures are the builder's own.
    """

    component: str
    weights: Natural
    activations: Natural
    largest: Natural
    io: Natural
    streamable: Natural = 0
    uncertain: Natural = 0


def on_device(provider: str) -> bool:
    """Return whether the engines of `provider` use device memory instead of host memory."""
    return provider not in ("ort-cpu", "openvino")


def shares_activations(provider: str) -> bool:
    """Return whether all engines share one block of activations; those of ONNX Runtime and OpenVINO have one each."""
    return provider.startswith("tensorrt")


def exact_sizes(height: int, width: int) -> Sizes:
    """Return the sizes of a request for one picture of `height` × `width` pixels, with a prompt of TOKENS."""
    return Sizes(height=fixed(height), width=fixed(width), batch=fixed(1), tokens=fixed(TOKENS), static=True)


def need_of(
    manifest: Manifest,
    name: str,
    provider: str,
    sizes: Sizes,
    record: PlanRecord | None = None,
    at: RunSizes | Extent = "usual",
) -> Need:
    """Return the memory of component `name` in a run that uses the profile `at`.

    Its plan's `record` states the figures; without one they are estimated for a plan built for `sizes`. Raises
    SizeError if no profile takes the sizes of the run.
    """
    component, factor = manifest.components[name], manifest.base.vae.factor
    if record is not None:
        measured, profiles = record.memory, record.key.profiles
        stated = [measured.activations_of(index) for index in range(len(profiles))]
        chosen = _chosen(name, component, profiles, stated, at, factor)
        return Need(
            component=name,
            weights=measured.weights,
            activations=stated[chosen],
            largest=max(stated),
            io=_io_bytes(component, profiles[chosen]),
            streamable=measured.streamable,
        )
    if not shares_activations(provider):
        return _graph_need(manifest, name, provider, sizes)
    profiles = _profiles(component, axes_of(component.kind, component.float_precision, sizes, factor))
    estimates = estimate_each(component, profiles)
    chosen = _chosen(name, component, profiles, estimates, at, factor)
    weights, activations = component.used_bytes, estimates[chosen]
    return Need(
        component=name,
        weights=weights,
        activations=activations,
        largest=max(estimates),
        io=_io_bytes(component, profiles[chosen]),
        streamable=int(weights * _STREAMABLE) if component.kind in ("unet", "controlnet") else 0,
        uncertain=int(activations * estimate_error(component) + weights * _PLAN_ERROR),
    )


def _chosen(
    name: str,
    component: Component,
    profiles: Sequence[Profile],
    activations: Sequence[int],
    at: RunSizes | Extent,
    factor: int,
) -> int:
    if isinstance(at, RunSizes):
        return profile_for_run(name, component, profiles, at, factor)
    if at == "usual":
        return usual_profile(profiles)
    return (min if at == "least" else max)(range(len(profiles)), key=activations.__getitem__)


def _graph_need(manifest: Manifest, name: str, provider: str, sizes: Sizes) -> Need:
    """Return an estimate for ONNX Runtime or OpenVINO at the usual of `sizes`; they decode pictures whole."""
    component = manifest.components[name]
    axes = axes_of(component.kind, "fp16", replace(sizes, static=True), manifest.base.vae.factor)
    profiles = _profiles(component, axes)
    device = on_device(provider)
    precision = component.float_precision if device else "fp32"
    weights = component.used_bytes if device else host_need(component, provider)
    activations = estimate_activations(component, profiles, precision)
    if provider not in ("ort-tensorrt", "openvino"):
        activations += score_bytes(component, profiles, precision)
    uncertain = int((weights + activations) * _ORT_ERROR)
    io = _io_bytes(component, profiles[usual_profile(profiles)])
    return Need(component=name, weights=weights, activations=activations, largest=activations, io=io,
                uncertain=uncertain)  # fmt: skip


def host_need(component: Component, provider: str = "ort-cpu") -> int:
    """Return an estimate, in bytes, of a component's weights in host memory on a provider that computes there."""
    times = _ORT_WEIGHTS[component.precision] if provider == "ort-cpu" else _OPENVINO_WEIGHTS
    return int(component.parameters * _FP32_BYTES * times)


def _profiles(component: Component, axes: list[dict[str, Range]]) -> tuple[Profile, ...]:
    return component_profiles({spec.name: spec.shape for spec in component.inputs}, axes)


def _io_bytes(component: Component, profile: Profile) -> int:
    """Return the bytes of a component's inputs and outputs at the largest shapes of a profile.

    What a UNet keeps for its shallow one lies in two buffers, which count as the inputs of that one.
    """
    axes = largest_axes(component, profile)
    return sum(_bytes(spec, axes) for spec in (*component.inputs, *component.outputs))


def _bytes(spec: TensorSpec, axes: Mapping[str, int]) -> int:
    return math.prod(axis_size(axis, axes) for axis in spec.shape) * _ITEM[spec.dtype]
