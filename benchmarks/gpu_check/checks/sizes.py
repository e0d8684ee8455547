"""Checks of a UNet at other shapes than the one it is tuned for: sizes, prompt lengths, rows, profiles."""

__all__ = ["guidance_changes", "prompt_lengths", "sizes_off_the_optimum", "static_against_range"]

import math
from collections.abc import Sequence

import numpy as np

from sdxl_trt.benchmarks.gpu_check.checks.calls import (
    Shape,
    call,
    forced_profile,
    loaded,
    reference_outputs,
    stage_of,
    unet_feed,
    usual_shape,
)
from sdxl_trt.benchmarks.gpu_check.checks.findings import Finding, Skipped, finding, require
from sdxl_trt.benchmarks.gpu_check.checks.likeness import CALL_COSINE, Array, cosine, same
from sdxl_trt.benchmarks.gpu_check.checks.workplace import Workplace
from sdxl_trt.benchmarks.measure import Figure
from sdxl_trt.engines.bundle import Bundle, Flavour, Range, read_bundle
from sdxl_trt.engines.plans import PlanLimits, plan_limits

# Two of SDXL's own training sizes, as shares of the usual side.
_PORTRAITS = ((1216 / 1024, 832 / 1024), (1152 / 1024, 896 / 1024))
_CHUNKS = (2, 3)


def sizes_off_the_optimum(stage: str, flavour: Flavour, workplace: Workplace) -> Finding:
    """The UNet matches ONNX Runtime at the smallest, the largest and two portrait sizes: NaN was seen there once."""
    bundle, limits = _limits(stage, flavour, workplace)
    usual = usual_shape(bundle)
    sides = [(limits.height.min, limits.width.min), (limits.height.max, limits.width.max)]
    sides += [(_side(usual.height * tall, bundle, limits.height), _side(usual.width * wide, bundle, limits.width))
              for tall, wide in _PORTRAITS]  # fmt: skip
    # One row where a CPU computes the reference of a large model: the largest size takes it minutes.
    rows = 1 if workplace.reference() == "ort-cpu" and not workplace.quick and limits.fewest == 1 else 2
    shapes = [Shape(rows, height, width) for height, width in dict.fromkeys(sides)]
    shapes = [shape for shape in shapes if (shape.height, shape.width) != (usual.height, usual.width)]
    if not shapes:
        raise Skipped("the plans take one size")
    return _match(shapes, stage, flavour, workplace)


def prompt_lengths(stage: str, flavour: Flavour, workplace: Workplace) -> Finding:
    """The UNet matches ONNX Runtime for prompts of two and three chunks: 154 and 231 tokens."""
    bundle, limits = _limits(stage, flavour, workplace)
    usual = usual_shape(bundle)
    lengths = [chunks * usual.tokens for chunks in _CHUNKS if chunks * usual.tokens in limits.tokens]
    if not lengths:
        raise Skipped(f"the plans take {limits.tokens} tokens")
    shapes = [Shape(2, limits.height.min, limits.width.min, tokens) for tokens in lengths]
    return _match(shapes, stage, flavour, workplace)


def guidance_changes(stage: str, flavour: Flavour, workplace: Workplace) -> Finding:
    """One and two rows in turn, as guidance switched on and off gives, equal the same calls by a fresh engine."""
    bundle, limits = _limits(stage, flavour, workplace)
    name, factor = stage_of(bundle, stage).unet, bundle.manifest.base.vae.factor
    if limits.fewest > 1:
        raise Skipped(f"the plans take {limits.fewest} rows and more")
    component = bundle.manifest.components[name]
    feeds = [unet_feed(component, usual_shape(bundle, rows), factor) for rows in (2, 1)]
    alone: list[Array] = []
    for feed in feeds:
        with loaded(workplace, flavour, name) as engine:
            alone.append(call(engine, feed))
    worst = "equal bit for bit"
    with loaded(workplace, flavour, name) as engine:
        for turn in range(6):
            agree, difference = same(call(engine, feeds[turn % 2]), alone[turn % 2])
            seen = f"rows {feeds[turn % 2]['sample'].shape[0]}, turn {turn + 1}: {difference}"
            require(agree, finding(seen), "a fresh engine computes something else")
            worst = worst if difference.startswith("equal") else difference
    return finding(f"2 and 1 rows in turn, 6 calls: {worst}")


def static_against_range(stage: str, flavour: Flavour, workplace: Workplace) -> Finding:
    """All profiles of the plan that take the usual shape compute the same for it."""
    bundle, _ = _limits(stage, flavour, workplace)
    name, factor = stage_of(bundle, stage).unet, bundle.manifest.base.vae.factor
    feed = unet_feed(bundle.manifest.components[name], usual_shape(bundle), factor)
    shapes = {key: array.shape for key, array in feed.items()}
    profiles = workplace.records(flavour, name)[name].key.profiles
    holding = [index for index, profile in enumerate(profiles) if profile.holds(shapes)]
    if len(holding) < 2:
        raise Skipped(f"one of the plan's {len(profiles)} profiles takes the usual shape")
    outputs = []
    for index in holding:
        with forced_profile(index), loaded(workplace, flavour, name) as engine:
            outputs.append(call(engine, feed))
    lowest = min(cosine(output, outputs[0]) for output in outputs)
    found = finding(f"{len(holding)} profiles, lowest cosine {lowest:.6f}", Figure("lowest cosine", lowest))
    return require(lowest >= CALL_COSINE, found, f"at least {CALL_COSINE} is required")


def _limits(stage: str, flavour: Flavour, workplace: Workplace) -> tuple[Bundle, PlanLimits]:
    name = stage_of(read_bundle(workplace.root), stage).unet
    bundle = workplace.planned(flavour, name)
    limits = plan_limits(bundle, workplace.records(flavour, name).values())
    if limits is None:
        raise Skipped(f"the plan of {name} states no sizes")
    return bundle, limits


def _side(wanted: float, bundle: Bundle, sides: Range) -> int:
    """Return the multiple of the model's sizes that is nearest to `wanted` pixels and within `sides`."""
    multiple = math.lcm(*(stage.size_multiple for stage in bundle.manifest.stages().values()))
    return min(max(round(wanted / multiple) * multiple, sides.min), sides.max)


def _match(shapes: Sequence[Shape], stage: str, flavour: Flavour, workplace: Workplace) -> Finding:
    """Compare the UNet with ONNX Runtime at `shapes`."""
    bundle = read_bundle(workplace.root)
    name, factor = stage_of(bundle, stage).unet, bundle.manifest.base.vae.factor
    feeds = [unet_feed(bundle.manifest.components[name], shape, factor) for shape in shapes]
    with loaded(workplace, flavour, name) as engine:
        outputs = [call(engine, feed) for feed in feeds]
    for shape, output in zip(shapes, outputs, strict=True):
        require(np.isfinite(output).all(), finding(f"NaN or infinity at {shape}"), "finite values are required")
    expected = reference_outputs(workplace, name, feeds)
    cosines = [cosine(output, other) for output, other in zip(outputs, expected, strict=True)]
    worst = min(range(len(shapes)), key=lambda i: cosines[i])
    seen = (
        f"{len(shapes)} shapes against {workplace.reference()}; lowest cosine {cosines[worst]:.6f} at {shapes[worst]}"
    )
    found = finding(seen, Figure("lowest cosine", cosines[worst]))
    return require(cosines[worst] >= CALL_COSINE, found, f"at least {CALL_COSINE} is required")
