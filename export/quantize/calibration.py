"""Measures the ranges of a model's activations: the model draws prompts, component by component, and is watched."""

__all__ = ["Located", "Measured", "describe", "drawing_of", "measure_activations"]

import gc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sdxl_trt.engines import Array, CorruptError
from sdxl_trt.engines.bundle import Component
from sdxl_trt.export.components import RUN_ORDER, CalibrationOptions, ComponentPlan, StagePlan
from sdxl_trt.export.eight_bit import Ranges, add_range_outputs, add_sample_outputs, compute_in_fp32, find_layers
from sdxl_trt.export.graph import vae_factor
from sdxl_trt.export.quantize.prompts import shipped_prompts
from sdxl_trt.export.quantize.session import GraphSession
from sdxl_trt.export.verify import Call, RecordedPicture, Recording, RecordingSettings

Progress = Callable[[str, str], None]
# As in SDXL, the refiner takes over at a fifth of the training timesteps.
_HIGHEST, _HANDOFF = 0.999, 0.2
# A small model draws at its own size; any other at 512 pixels or less, and of SDXL's size only little, for minutes.
_LARGE, _SMALL_SIDE = 1_000_000_000, 32
_MOST_PIXELS = 512
_PROMPTS = {"small": 12, "medium": 4, "large": 2}
_STEPS = {"small": (24, 6), "medium": (8, 2), "large": (4, 2)}
_SAMPLED_CALLS = 4


@dataclass
class Measured:
    """What was seen of one component: ranges, and of a few calls the calls themselves and samples of layers' inputs."""

    ranges: Ranges
    calls: list[Call] = field(default_factory=list)
    samples: dict[str, list[Array]] = field(default_factory=dict)


@dataclass(frozen=True)
class Located:
    """A component of the run: its record, and the folder of its files; `watched` if its ranges are measured."""

    component: Component
    folder: Path
    watched: bool


def drawing_of(stages: Mapping[str, StagePlan], options: CalibrationOptions, *, mini: bool) -> RecordingSettings:
    """Return what to draw: `options`, and where they say nothing, what suits a model of this size."""
    base = stages["base"]
    factor = vae_factor(base.models["vae"].config)
    native = base.models["unet"].config["sample_size"] or 128
    native = native if isinstance(native, int) else native[0]
    parameters = sum(math.prod(shape) for shape in base.models["unet"].state.values())
    size = "large" if parameters >= _LARGE else "small" if native <= _SMALL_SIDE else "medium"
    prompts = options.prompts or shipped_prompts(mini=mini)[: _PROMPTS[size]]
    base_steps, refiner_steps = options.steps or _STEPS[size]
    side = min(_MOST_PIXELS // factor, native) if options.size is None else options.size // factor
    multiple = max(2 ** int(stage.models["unet"].module.num_upsamplers) for stage in stages.values())
    side = -(-side // multiple) * multiple  # as a recording does, so that what is told is what is drawn
    last = len(prompts)
    return RecordingSettings(
        prompts=(*prompts, ""),
        pictures=tuple(RecordedPicture((side, side), ((place,), (last,))) for place in range(last)),
        base_grid=_spread(_HIGHEST, _HANDOFF, base_steps),
        refiner_grid=_spread(_HANDOFF, 0.0, refiner_steps),
        further=False,
    )


def describe(drawing: RecordingSettings, stages: Mapping[str, StagePlan]) -> str:
    """Return a drawing in words."""
    factor = vae_factor(stages["base"].models["vae"].config)
    side = factor * drawing.pictures[0].size[0]
    steps = [len(drawing.base_grid), *([len(drawing.refiner_grid)] if "refiner" in stages else [])]
    count = len(drawing.pictures)
    return f"{count} prompt{'' if count == 1 else 's'}, {side}x{side}, {' + '.join(map(str, steps))} steps"


def measure_activations(
    plans: Mapping[str, ComponentPlan],
    stages: Mapping[str, StagePlan],
    located: Mapping[str, Located],
    drawing: RecordingSettings,
    progress: Progress,
    *,
    sampled: bool,
) -> dict[str, Measured]:
    """Draw, and return what was seen of every watched component; one of them is in memory at a time.

    With `sampled`, a few calls are kept, and samples of what the layers read in them. Raises CorruptError for NaN.
    """
    order = sorted((name for name, plan in plans.items() if plan.kind in RUN_ORDER and name in located),
                   key=lambda name: RUN_ORDER.index(plans[name].kind))  # fmt: skip
    watched = [name for name in order if located[name].watched]
    recording = Recording(stages, drawing)
    found: dict[str, Measured] = {}
    for name in order[: order.index(watched[-1]) + 1] if watched else []:
        place, plan = located[name], plans[name]
        if not place.watched:
            progress(name, "drawing")
            _draw(name, plan, place, recording)
        else:
            found[name] = _watch(name, plan, place, recording, progress, sampled=sampled)
        gc.collect()
    return found


def _draw(name: str, plan: ComponentPlan, place: Located, recording: Recording) -> None:
    """Run a component on its part of the drawing."""
    outputs = list(place.component.results)
    with GraphSession(_graph(place), place.folder, basic=place.component.precision == "fp8") as session:
        recording.calls(name, plan, lambda inputs: _finite(name, session.run(inputs, outputs)))


def _watch(
    name: str, plan: ComponentPlan, place: Located, recording: Recording, progress: Progress, *, sampled: bool
) -> Measured:
    """Run a component on its part of the drawing, with outputs for the ranges of its activations."""
    model = _graph(place)
    compute_in_fp32(model)
    extremes = add_range_outputs(model)
    samples = add_sample_outputs(model, find_layers(model)) if sampled else {}
    seen = Measured(Ranges(name))
    outputs = list(place.component.results)
    total = recording.count(name, plan)
    kept = {round(each) for each in np.linspace(0, total - 1, min(total, _SAMPLED_CALLS))} if sampled else set[int]()
    done = 0

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        nonlocal done
        progress(name, f"measuring ranges, {done + 1} of {total}")
        wanted = [*outputs, *extremes.names, *(dict.fromkeys(samples.values()) if done in kept else ())]
        results = session.run(inputs, wanted)
        extremes.record(results, seen.ranges)
        made = _finite(name, {output: results[output] for output in outputs})
        if done in kept:
            seen.calls.append(Call(f"call {done + 1}", dict(inputs), made))
            for module, sample in samples.items():
                seen.samples.setdefault(module, []).append(results[sample])
        done += 1
        return made

    with GraphSession(model, place.folder) as session:
        recording.calls(name, plan, run)
    return seen


def _finite(name: str, outputs: dict[str, Array]) -> dict[str, Array]:
    """Return `outputs`. Raises CorruptError for NaN and infinity.

    NaN reaches the outputs from wherever it arises; ONNX Runtime's ReduceMin and ReduceMax ignore it.
    """
    for output, value in outputs.items():
        if not np.isfinite(value).all():
            raise CorruptError(f"{name}: {output} holds NaN or infinity while the ranges are measured; the checkpoint"
                               " is damaged, or its activations overflow fp16")  # fmt: skip
    return outputs


def _graph(place: Located) -> ir.Model:
    """Return the graph of a component that is fastest on a CPU."""
    record = place.component.cpu_graph or place.component.graph
    return ir.load(place.folder / Path(record.file).name)


def _spread(high: float, low: float, count: int) -> tuple[float, ...]:
    """Return `count` fractions from `high` down to above `low`."""
    return tuple(high - (high - low) * place / count for place in range(count))
