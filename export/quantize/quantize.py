"""All 8-bit components of an export: measure, choose what stays in floating point, quantize, and report."""

__all__ = ["quantize_components"]

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from sdxl_trt.engines import CorruptError, UsageError, explain_os_error
from sdxl_trt.engines.bundle import WEIGHT, Component
from sdxl_trt.engines.host import atomic_write
from sdxl_trt.export.components import CalibrationOptions, Exported, ExportJob, ProgressTracker, StagePlan
from sdxl_trt.export.eight_bit import (
    INPUT,
    LayerError,
    find_layers,
    layer_error,
    read_stored,
    reason_to_exclude,
    worst_first,
)
from sdxl_trt.export.quantize.calibration import (
    Located,
    Measured,
    describe,
    drawing_of,
    measure_activations,
)
from sdxl_trt.export.quantize.component import EightBitJob, quantize_component, step_psnr
from sdxl_trt.export.quantize.ranges_file import load_ranges, save_ranges

_TRIAL = "trial"
_BY_USER = "excluded by --exclude-layers"


def quantize_components(
    jobs: Mapping[str, ExportJob],
    stages: Mapping[str, StagePlan],
    floats: Mapping[str, Component],
    made: Mapping[str, Component],
    root: Path,
    options: CalibrationOptions,
    report: ProgressTracker,
    *,
    mini: bool,
) -> dict[str, Exported]:
    """Return {name: component} of those in `floats`, which lie in `root`, quantized to ``root/name``.

    `made` are the bundle's other components, in `root`, which take part in the drawing. Raises CorruptError and
    UsageError for a calibration that does not fit, UsageError if `options.min_psnr` cannot be reached.
    """
    plans = {name: job.plan for name, job in jobs.items()}
    measured: dict[str, Measured] = {}
    told = f"ranges of {options.file.name}" if options.file else ""
    if options.draws:
        located = {
            **{name: Located(component, _folder(root, component), watched=False) for name, component in made.items()},
            **{name: Located(component, _folder(root, component), watched=True) for name, component in floats.items()},
        }
        drawing = drawing_of(stages, options, mini=mini)
        told = told or describe(drawing, stages)
        sampled = options.report is not None or options.min_psnr is not None
        measured = measure_activations(plans, stages, located, drawing, report.stage, sampled=sampled)
    ranges = {name: each.ranges for name, each in measured.items()}
    if options.file is not None:
        ranges = load_ranges(options.file, {name: plans[name].digest for name in floats})
    elif options.save is not None:
        save_ranges(options.save, {name: (plans[name].digest, each) for name, each in ranges.items()})
    found, told_errors = dict[str, Exported](), dict[str, object]()
    for name, component in floats.items():
        job = EightBitJob(name=name, precision=plans[name].precision, key=jobs[name].key, source=component,
                          folder=_folder(root, component), ranges=ranges[name], calibration=told)  # fmt: skip
        excluded = dict.fromkeys(options.exclude, _BY_USER)
        errors = list(_errors(job, measured[name], excluded)) if name in measured and measured[name].calls else []
        if options.min_psnr is not None:
            report.stage(name, f"choosing layers for {options.min_psnr:g} dB")
            excluded |= _exclusions(job, root, errors, measured[name], excluded, options.min_psnr)
        report.stage(name, "quantizing")
        found[name] = quantize_component(job, root, excluded, report.written)
        if options.report is not None:
            psnr = step_psnr(root / name, job.scheme, measured[name].calls)
            if psnr == -math.inf:
                raise CorruptError(f"{name}: computes NaN or infinity in {plans[name].precision}; measure its ranges on"
                                   " other prompts, or export with --fp16")  # fmt: skip
            told_errors[name] = _told(errors, found[name].component, psnr)
    if options.report is not None:
        _write_report(options.report, told_errors)
    return found


def _folder(root: Path, component: Component) -> Path:
    return (root / component.graph.file).parent


def _errors(job: EightBitJob, measured: Measured, excluded: Mapping[str, str]) -> Iterator[LayerError]:
    """Yield the own error of every layer, also of those that stay in floating point; the worst sample counts."""
    table = job.table().by_name
    for layer in find_layers(job.graph()):
        weight = read_stored(job.folder, table[layer.module + WEIGHT])
        reason = reason_to_exclude(layer.module, excluded) or ""
        span = job.ranges.of(layer.module + INPUT)
        found = [layer_error(layer, sample, weight, span, job.scheme, reason)
                 for sample in measured.samples[layer.module]]  # fmt: skip
        yield worst_first(found)[0]


def _exclusions(
    job: EightBitJob,
    root: Path,
    errors: Sequence[LayerError],
    measured: Measured,
    excluded: Mapping[str, str],
    wanted: float,
) -> dict[str, str]:
    """Return as few further layers as it takes to reach a PSNR of `wanted` dB, the worst first, with the reason.

    It bisects their number: a dozen steps of the model in all.
    """
    candidates = [each for each in worst_first(errors) if not each.excluded]

    def first(count: int) -> dict[str, str]:
        return {each.module: f"its own error is {each.snr_db:g} dB, too much for --min-psnr {wanted:g}"
                for each in candidates[:count]}  # fmt: skip

    def reached(count: int) -> float:
        quantize_component(job, root, {**excluded, **first(count)}, name=_TRIAL)
        return step_psnr(root / _TRIAL, job.scheme, measured.calls)

    low, high = -1, len(candidates)  # `low` does not reach it, `high` is believed to: then nothing is in 8 bits
    while high - low > 1:
        middle = max(0, (low + high) // 2)
        if reached(middle) >= wanted:
            high = middle
        else:
            low = middle
    shutil.rmtree(root / _TRIAL, ignore_errors=True)
    if high == len(candidates):
        raise UsageError(f"--min-psnr {wanted:g}: {job.name} does not come that close in 8 bits; ask for less, or"
                         " export it with --fp16")  # fmt: skip
    return first(high)


def _told(errors: Sequence[LayerError], component: Component, psnr: float) -> dict[str, object]:
    """Return the report of a component: the step's PSNR, and its layers, the worst first."""
    excluded = {} if component.quantization is None else component.quantization.excluded
    layers = [msgspec.structs.replace(each, excluded=excluded.get(each.module, "")) for each in worst_first(errors)]
    return {
        "precision": component.precision,
        "step_psnr_db": round(psnr, 2) if math.isfinite(psnr) else None,
        "layers": msgspec.to_builtins(layers),
    }


def _write_report(path: Path, content: Mapping[str, object]) -> None:
    try:
        with atomic_write(path) as file:
            file.write((json.dumps(content, indent=1) + "\n").encode())
    except OSError as exc:
        raise explain_os_error(exc, f"writing --quantize-report {path}") from exc
