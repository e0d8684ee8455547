"""Refuses a calibration that cannot work before anything is written: a calibration takes minutes, or hours."""

__all__ = ["check_calibration"]

import fnmatch
from collections.abc import Iterator, Mapping
from pathlib import Path

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.bundle import WEIGHT
from sdxl_trt.export.components import RUN_ORDER, CalibrationOptions, ComponentPlan, ExportJob
from sdxl_trt.export.eight_bit import reason_to_exclude
from sdxl_trt.export.quantize.ranges_file import load_ranges

_MEASURES = "--calibration FILE.npz"


def check_calibration(
    options: CalibrationOptions, components: Mapping[str, ComponentPlan], jobs: Mapping[str, ExportJob], out: Path
) -> None:
    """Raise unless the 8-bit components among `jobs` can be made as `options` say.

    `components` are all of the models'; `out` is the folder that the export replaces. Raises UsageError, and
    CorruptError for a damaged file of ranges.
    """
    for option, path in (("--quantize-report", options.report), ("--save-calibration", options.save)):
        if path is not None:
            _check_place(option, path, out)
    made = {name: job.plan for name, job in jobs.items() if job.action == "export" and job.plan.eight_bit}
    if not made and options.tells:
        raise UsageError("--quantize-report and --save-calibration: no component of this export is measured; list the"
                         " UNets in --components, or leave --components out")  # fmt: skip
    chosen = {name: job.plan for name, job in jobs.items() if job.plan.eight_bit}
    _check_patterns(options.exclude, chosen)
    if options.file is not None:
        load_ranges(options.file, {name: plan.digest for name, plan in chosen.items() if jobs[name].action != "keep"})
    if made and options.draws:
        _check_run(made, components, jobs)


def _check_place(option: str, path: Path, out: Path) -> None:
    """Raise UsageError unless a file can appear at `path` that will still be there when `out` has been replaced."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UsageError(f"{option} {path}: is a folder, or in a folder that does not exist; name a file in a folder"
                         " that does")  # fmt: skip
    if path.resolve().is_relative_to(out.resolve()):
        raise UsageError(f"{option} {path}: lies in --out, which the export replaces; name a file outside")


def _check_patterns(patterns: tuple[str, ...], chosen: Mapping[str, ComponentPlan]) -> None:
    """Raise UsageError for a pattern without a layer, and for patterns that leave a component without 8-bit layers."""
    modules = {name: tuple(_layers(plan)) for name, plan in chosen.items()}
    for pattern in patterns if chosen else ():
        if not any(fnmatch.filter(names, pattern) for names in modules.values()):
            raise UsageError(f"--exclude-layers {pattern}: no layer of {' or '.join(chosen)} has such a name; the names"
                             " are in --quantize-report FILE, for example 'up_blocks.0.*'")  # fmt: skip
    given = dict.fromkeys(patterns, "given")
    for name, layers in modules.items():
        if all(reason_to_exclude(module, given) for module in layers):
            raise UsageError(f"--exclude-layers: nothing of {name} would compute in 8 bits; exclude less, or export"
                             " with --fp16")  # fmt: skip


def _layers(plan: ComponentPlan) -> Iterator[str]:
    """Yield the modules whose weight is a matrix or a kernel."""
    for name in plan.tensor_names():
        if name.endswith(WEIGHT) and len(plan.model.state[name]) > 1:
            yield name.removesuffix(WEIGHT)


def _check_run(
    made: Mapping[str, ComponentPlan], components: Mapping[str, ComponentPlan], jobs: Mapping[str, ExportJob]
) -> None:
    """Raise UsageError unless all components that run before the measured ones are there, and can run on a CPU."""
    kinds = [kind for kind in RUN_ORDER if kind != "vae_decoder"]  # a decoder does not run before another
    running = sorted((name for name, plan in components.items() if plan.kind in kinds),
                     key=lambda name: kinds.index(components[name].kind))  # fmt: skip
    if all(plan.kind in kinds for plan in made.values()):
        running = running[: max(map(running.index, made))]
    before = [name for name in running if name not in made]
    missing = [name for name in before if name not in jobs]
    if missing:
        raise UsageError(f"--components: measuring {', '.join(made)} takes {', '.join(missing)} too, which this export"
                         f" lacks; list it, or give measured ranges with {_MEASURES}")  # fmt: skip
    narrow = [name for name in before if jobs[name].plan.precision == "bf16"]
    if narrow:
        raise UsageError(f"{narrow[0]} is bf16, and ranges are measured on ONNX Runtime's CPU provider, which has no"
                         f" bf16; export it with --fp16, or give measured ranges with {_MEASURES}")  # fmt: skip
