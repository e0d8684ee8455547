"""Checks that measure time: one step, the handoff and what overlaps with it, operator sets, 8 bits. None has a limit.

They fail if an engine fails or computes something else; their figures are of one run, so they prove that it runs and
show where time goes, and are no benchmark.
"""

__all__ = ["eight_bits", "handoff", "operator_sets", "step_times"]

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sdxl_trt.benchmarks.gpu_check.checks.calls import call, loaded, stage_of, unet_feed, usual_shape
from sdxl_trt.benchmarks.gpu_check.checks.findings import Finding, Skipped, finding, require
from sdxl_trt.benchmarks.gpu_check.checks.likeness import (
    CALL_COSINE,
    EIGHT_BIT_COSINE,
    Array,
    cosine,
    decibels,
    same,
)
from sdxl_trt.benchmarks.gpu_check.checks.workplace import Measured, Workplace, draw, require_disk
from sdxl_trt.benchmarks.measure import Figure
from sdxl_trt.engines import IncompatibleError, numpy_dtype
from sdxl_trt.engines.backends.trt import TrtEngine, current_environment
from sdxl_trt.engines.build import build_plans
from sdxl_trt.engines.bundle import Bundle, Flavour, read_bundle, stand_ins
from sdxl_trt.engines.plans import find_plan

_BOUND = ("encoder_hidden_states", "text_embeds", "time_ids")
_WARM, _TIMED = 3, 10
_STEPS = 20


def step_times(flavour: Flavour, workplace: Workplace) -> Finding:
    """Time a step of every UNet and a decode at the usual size, with the constant inputs bound, as in a run."""
    bundle = workplace.planned(flavour)
    figures = []
    for name, stage in bundle.manifest.stages().items():
        with loaded(workplace, flavour, stage.unet) as engine:
            figures.append(Figure(f"{name} UNet step", _step(engine, bundle)[0], "s"))
    with loaded(workplace, flavour, _decoder(bundle, flavour)) as engine:
        figures.append(Figure("VAE decode", _decode(engine, bundle)[0], "s"))
    shape = usual_shape(bundle)
    return finding(f"medians of {_TIMED} at {shape}: {_words(figures)}", *figures)


def handoff(flavour: Flavour, workplace: Workplace) -> Finding:
    """Time the first step from cold, base steps, and the change to the refiner, under the residencies that fit.

    Only under `resident` the refiner loads beside base steps.
    """
    bundle = workplace.planned(flavour)
    stage_of(bundle, "refiner")
    shape = usual_shape(bundle)
    usual = dataclasses.replace(workplace.request(), steps=_STEPS, handoff=0.8, width=shape.width, height=shape.height)
    runs: dict[str, Measured] = {}
    latents = []
    residencies = _fitting(flavour, workplace)
    for residency in residencies:
        opened = time.perf_counter()
        with workplace.opened(flavour, residency) as pool:
            for state, since in (("cold", opened), ("warm", None)):
                drawn = draw(pool, usual, since)
                latents.append(drawn.latents)
                runs[f"{residency}, {state}"] = drawn.figures
    cold, warm = runs[f"{residencies[0]}, cold"], runs[f"{residencies[0]}, warm"]
    figures = [
        Figure("first step from cold", cold.first_step, "s"),
        Figure("base step alone", _median(warm.seconds["base"]), "s"),
        *(_beside_the_load(cold.seconds["base"]) if residencies[0] == "resident" else ()),
        *(Figure(f"stall at the handoff, {name}", run.seconds["load"][1], "s") for name, run in runs.items()),
        Figure("picture", warm.total, "s"),
    ]
    found = finding(f"{_STEPS} steps, {' and '.join(residencies)}: {_words(figures)}", *figures)
    differing = [difference for each in latents[1:] for agree, difference in [same(each, latents[0])] if not agree]
    return require(not differing, found, f"the runs differ: {', '.join(differing)}")


def _fitting(flavour: Flavour, workplace: Workplace) -> tuple[str, ...]:
    """Return the residencies to time that fit into memory, the largest first. Raises Skipped if none does."""
    try:
        workplace.require_fit(flavour, "resident")
    except Skipped:
        workplace.require_fit(flavour, "swap")
        return ("swap",)
    return "resident", "swap"


def _beside_the_load(seconds: list[float]) -> tuple[Figure, Figure]:
    """Return the figures of base steps during which the refiner loads: one slow step is lost in the median."""
    slowest = max(seconds[1:] or seconds)
    return (
        Figure("base step while the refiner loads", _median(seconds), "s"),
        Figure("slowest base step while the refiner loads", slowest, "s"),
    )


def operator_sets(flavour: Flavour, workplace: Workplace) -> Finding:
    """Time the base's UNet and the decoder as exported for two operator sets: normalization is one node in only one."""
    other = workplace.other_opset
    if other is None or not other.exists():
        raise Skipped("there is no second export of the same graphs; the full-size pair has one")
    bundle = workplace.planned(flavour)
    figures, cosines, exported = [], [], read_bundle(other, partial=True).manifest.components
    pairs = ((bundle.manifest.base.unet, _step), (_decoder(bundle, flavour), _decode))
    apart = [name for name, _ in pairs if name not in exported]  # it has the decoder of GPUs with bf16 only
    for name, run in pairs:
        if name in apart:
            continue
        _require_plan(other, flavour, name, workplace)
        outputs = []
        for root in (None, other):
            with loaded(workplace, flavour, name, root=root) as engine:
                seconds, output = run(engine, bundle)
                figures.append(Figure(f"{name}, opset {engine.component.opset}", seconds, "s"))
                outputs.append(output)
        cosines.append(cosine(outputs[1], outputs[0]))
    lowest = min(cosines)
    seen = f"{_words(figures)}; lowest cosine {lowest:.6f}" + "".join(
        f"; {name} has no second export" for name in apart
    )
    found = finding(seen, *figures, Figure("lowest cosine", lowest))
    # Both exports round to half precision, each in its own way.
    return require(lowest >= 1 - 20 * (1 - CALL_COSINE), found, "the exports must compute the same")


def eight_bits(flavour: Flavour, workplace: Workplace) -> Finding:
    """Time a step of every UNet in 8 bits and in fp16, and compare what they compute from the same inputs."""
    other = workplace.eight_bit
    if other is None or not other.exists():
        raise Skipped("there are no UNets in 8 bits; those of the full-size pair are made with: python -m"
                      " sdxl_trt.benchmarks.gpu_check.pair --int8")  # fmt: skip
    bundle = workplace.planned(flavour)
    figures, likeness, differing = [], [], []
    for name, stage in bundle.manifest.stages().items():
        _require_plan(other, flavour, stage.unet, workplace)
        seconds, outputs = [], []
        for root in (None, other):
            with loaded(workplace, flavour, stage.unet, root=root) as engine:
                each, output = _step(engine, bundle)
                figures.append(Figure(f"{name} UNet step, {engine.component.precision}", each, "s"))
                seconds.append(each)
                outputs.append(output)
        found = cosine(outputs[1], outputs[0])
        figures += [Figure(f"{name} UNet, 8 bits / floats", seconds[1] / seconds[0]),
                    Figure(f"{name} UNet, PSNR of a step", decibels(outputs[1], outputs[0]), "dB"),
                    Figure(f"{name} UNet, cosine", found)]  # fmt: skip
        likeness.append(f"{name} cosine {found:.6f}, {seconds[1] / seconds[0]:.2f} of the time")
        differing += [name] if found < EIGHT_BIT_COSINE else []
    seen = finding(f"{_words(figures)}; {'; '.join(likeness)}", *figures)
    return require(not differing, seen, f"a cosine of {EIGHT_BIT_COSINE:.3f} is required: {', '.join(differing)}")


def _require_plan(root: Path, flavour: Flavour, name: str, workplace: Workplace) -> None:
    """Build the plan of component `name` of the other export if it has none."""
    try:
        find_plan(read_bundle(root, partial=True), name, current_environment(flavour))
    except IncompatibleError:
        require_disk(root, [name])
        build_plans(root, flavour, flags=workplace.flags, components=[name])


def _decoder(bundle: Bundle, flavour: Flavour) -> str:
    """Return the base's decoder that TensorRT runs on this machine's GPU."""
    decoder = bundle.manifest.base.vae.decoder
    replaced = stand_ins(bundle.manifest, flavour, current_environment(flavour).compute_capability)
    return replaced.get(decoder, decoder)


def _step(engine: TrtEngine, bundle: Bundle) -> tuple[float, Array]:
    """Return the median seconds of a step at the usual size, and its output."""
    feed = unet_feed(engine.component, usual_shape(bundle), bundle.manifest.base.vae.factor)
    engine.bind({name: feed.pop(name) for name in _BOUND})
    return _timed(lambda: call(engine, feed))


def _decode(engine: TrtEngine, bundle: Bundle) -> tuple[float, Array]:
    """Return the median seconds of a decode at the size that a plan's first profile is tuned for, and its output."""
    profile = next(record.key.profiles[0] for record in bundle.manifest.plans if record.key.component == engine.name)
    (spec,) = engine.component.inputs
    latents = np.random.default_rng(0).standard_normal(profile.shapes[spec.name][1]).astype(numpy_dtype(spec))
    return _timed(lambda: call(engine, {spec.name: latents}))


def _timed(run: Callable[[], Array]) -> tuple[float, Array]:
    seconds = []
    for _ in range(_WARM + _TIMED):
        started = time.perf_counter()
        output = run()
        seconds.append(time.perf_counter() - started)
    require(np.isfinite(output).all(), finding("NaN or infinity was computed"), "finite values are required")
    return statistics.median(seconds[_WARM:]), output


def _median(seconds: list[float]) -> float:
    """Return the median without the first step, which sets shapes and captures."""
    return statistics.median(seconds[1:] or seconds)


def _words(figures: list[Figure]) -> str:
    return ", ".join(f"{figure.name} {figure.value * 1e3:.1f} ms" for figure in figures if figure.unit == "s")
