"""A run of trt-bench: prepare the contestants one by one, run the tasks in turns, and return a report."""

__all__ = ["BenchOptions", "run_bench", "settled_spec"]

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sdxl_trt.benchmarks.contest.child import Child, ContestantError
from sdxl_trt.benchmarks.contest.cold_start import cold_starts
from sdxl_trt.benchmarks.contest.entries import contestant, measurement
from sdxl_trt.benchmarks.contest.floors import cpu_floors, cpu_rates, rate_facts
from sdxl_trt.benchmarks.contest.inputs import draw_inputs, write_inputs
from sdxl_trt.benchmarks.contest.ratios import ratios
from sdxl_trt.benchmarks.contest.roster import (
    FASTEST,
    OURS,
    OURS_INT8,
    Entry,
    choose,
    command,
    cores,
    environment,
    shown,
    unable,
)
from sdxl_trt.benchmarks.contest.sweeps import is_usual, sweep_asks
from sdxl_trt.benchmarks.contest.turns import Entrant, Plan, close, prepare, take_turns
from sdxl_trt.benchmarks.contestants import TASKS, Ask, Spec
from sdxl_trt.benchmarks.measure import Nvml, Say, Subject, load_average, machine, no_driver, package_versions
from sdxl_trt.benchmarks.report import BenchReport, BenchSettings, Measurement
from sdxl_trt.engines import EngineError, UsageError
from sdxl_trt.runtime.request import Request, resolve_request

PROMPT = "a large red star on a blue background"
PACKAGES = ("sdxl-trt", "numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "torch", "diffusers")
COLD_RUNS = 5
SWEEP_RUNS = 3
BUSY = 0.5
"""Load average above which the report notes that the machine was not idle."""


@dataclass(frozen=True)
class BenchOptions:
    """Options of a run. A width or height of None is the model's own; a handoff of None is the base alone."""

    against: str | None = None
    steps: int = 30
    width: int | None = None
    height: int | None = None
    batch: int = 1
    runs: int = 7
    step_runs: int | None = None
    """Rounds of a UNet step, which is short; None is `runs`."""
    warmups: int = 1
    components: bool = False
    sweeps: bool = False
    cold: bool = False
    floors: bool = True
    quick: bool = False
    guidance: float = 5.0
    handoff: float | None = 0.8
    seed: int = 7
    prompt: str = PROMPT


def run_bench(subject: Subject, options: BenchOptions, say: Say = lambda _: None) -> BenchReport:
    """Measure `subject` and return the report without command, bars and quality, which the caller adds.

    Raises UsageError for invalid options, and EngineError if sdxl-trt itself does not run; the report states why
    another contestant did not run.
    """
    entries, load, gpu = choose(options.against), load_average(), no_driver() is None
    with tempfile.TemporaryDirectory(prefix="sdxl-trt-bench-") as name, ExitStack() as stack:
        folder, nvml = Path(name), Nvml()
        spec = settled_spec(subject, options, inputs=folder / "inputs.npz", device="cuda" if gpu else "cpu")
        _write(subject, spec, folder / "spec.json")
        quick = options.quick and options.against is None
        entrants = [_enter(entry, spec, folder / "spec.json", gpu=gpu, quick=quick) for entry in entries]
        for entrant in entrants:
            stack.callback(entrant.end)
        for entrant in entrants:
            say(f"{entrant.name}: {entrant.missing or 'preparing'}")
            prepare(entrant, nvml)
        if entrants[0].missing:
            raise EngineError(f"sdxl-trt itself does not run: {entrants[0].missing}")
        multiple = math.lcm(*(stage.size_multiple for stage in subject.bundle.manifest.stages().values()))
        measured = list(_measure(entrants, spec, options, folder, nvml, say, multiple))
        for entrant in entrants:
            close(entrant)
    started, drawn = cold_starts(subject, spec, min(options.runs, COLD_RUNS), say=say) if options.cold else ((), "")
    rates, note = cpu_rates(spec.threads) if options.floors and not gpu else ({}, "")
    floors, note = cpu_floors(subject.bundle, spec, rates) if rates else ({}, note)
    return BenchReport(
        machine=machine() | rate_facts(rates) | {"load": f"{load:.2f}"},
        versions=package_versions(PACKAGES),
        settings=_settings(subject, options, spec),
        contestants=tuple(contestant(entrant, spec.device) for entrant in entrants),
        measurements=tuple(measured),
        floors=floors,
        ratios=tuple(ratio for ours in (OURS, OURS_INT8, FASTEST) for ratio in ratios(measured, ours)),
        cold_starts=started,
        notes=tuple(_notes(note, drawn, load)),
    )


def settled_spec(subject: Subject, options: BenchOptions, *, inputs: Path = Path(), device: str = "cpu") -> Spec:
    """Return the spec of every contestant, with the model's sizes and handoff filled in. Raises UsageError."""
    for option, value in (("--steps", options.steps), ("--batch", options.batch), ("--runs", options.runs)):
        if value < 1:
            raise UsageError(f"{option} {value}: give at least 1")
    manifest = subject.bundle.manifest
    handoff = options.handoff if manifest.refiner is not None else None
    request = Request(options.prompt, steps=options.steps, handoff=handoff, seed=options.seed, count=options.batch,
                      width=options.width, height=options.height)  # fmt: skip
    resolved = resolve_request(request, manifest)
    from sdxl_trt.export.quantize import shipped_prompts  # noqa: PLC0415 - torch comes with it

    return Spec(
        name="",
        bundle=str(subject.bundle.root.absolute()),
        base=subject.base,
        refiner=subject.refiner,
        inputs=str(inputs),
        cache=str(subject.cache.absolute()),
        device=device,
        threads=cores(),
        prompt=options.prompt,
        width=resolved.width,
        height=resolved.height,
        batch=options.batch,
        steps=options.steps,
        handoff=handoff,
        guidance=options.guidance,
        seed=options.seed,
        calibration=shipped_prompts(mini=subject.embedded),
    )


def _write(subject: Subject, spec: Spec, path: Path) -> None:
    """Write the files that every contestant reads: the inputs, and the spec that names them."""
    arrays = draw_inputs(subject.bundle, width=spec.width, height=spec.height, batch=spec.batch,
                         guidance=spec.guidance, seed=spec.seed, prompt=spec.prompt)  # fmt: skip
    write_inputs(Path(spec.inputs), arrays)
    path.write_bytes(msgspec.json.encode(spec))


def _enter(entry: Entry, spec: Spec, path: Path, *, gpu: bool, quick: bool) -> Entrant:
    """Return an entrant with its process started, or with the reason why it cannot run."""
    reason = unable(entry, checkpoint=bool(spec.base), gpu=gpu, quick=quick)
    line = command(entry, path)
    entrant = Entrant(entry, missing=reason, command=shown(line))
    if not reason:
        try:
            entrant.player = Child(line, environment(spec.threads))
        except ContestantError as exc:
            entrant.missing = str(exc)
    return entrant


def _measure(
    entrants: Sequence[Entrant], spec: Spec, options: BenchOptions, folder: Path, nvml: Nvml, say: Say, multiple: int
) -> Iterator[Measurement]:
    """Yield every contestant's measurement of every task, then ours by size, batch and handoff."""
    found: list[Measurement] = []
    for task in TASKS if options.components else TASKS[:1]:
        runs = (task.endswith("UNet step") and options.step_runs) or options.runs
        say(f"{task}: warming up")
        plan = Plan(Ask(do="run", task=task), runs, options.warmups, folder)
        turns = take_turns(entrants, plan, nvml, say)
        able = [entrant for entrant in entrants if entrant.name in turns.answers]
        reference = _reference(turns.outputs)
        found += [measurement(entrant, task, turns, spec, reference=reference) for entrant in able]
    yield from found
    if options.sweeps and found and found[0].contestant == OURS:
        yield from _sweep(entrants[0], spec, found[0], nvml, say, multiple)


def _sweep(
    entrant: Entrant, spec: Spec, usual: Measurement, nvml: Nvml, say: Say, multiple: int
) -> Iterator[Measurement]:
    """Yield our picture time by size, batch and handoff; points at the run's own settings reuse the `usual` one."""
    for sweep, ask in sweep_asks(spec, multiple):
        if is_usual(ask, spec):
            yield msgspec.structs.replace(usual, sweep=sweep)
            continue
        say(f"{sweep}: {ask.width or spec.width}x{ask.height or spec.height}, batch {ask.batch or spec.batch},"
            f" handoff {spec.handoff if ask.handoff == 'spec' else ask.handoff}")  # fmt: skip
        turns = take_turns([entrant], Plan(ask, SWEEP_RUNS, warmups=0), nvml)
        if turns.answers:
            yield measurement(entrant, TASKS[0], turns, spec, ask=ask, sweep=sweep)


def _reference(outputs: dict[str, Path]) -> str:
    """Return the contestant whose output is the reference: PyTorch if it took part, else the first one."""
    return next((name for name in ("eager", "diffusers") if name in outputs), next(iter(outputs), ""))


def _settings(subject: Subject, options: BenchOptions, spec: Spec) -> BenchSettings:
    return BenchSettings(
        bundle=subject.name,
        model=subject.model,
        width=spec.width,
        height=spec.height,
        batch=spec.batch,
        steps=spec.steps,
        handoff=spec.handoff,
        guidance=spec.guidance,
        seed=spec.seed,
        tokens=77,
        runs=options.runs,
        warmups=options.warmups,
        threads=spec.threads,
        prompt=spec.prompt,
    )


def _notes(floors: str, drawn: str, load: float) -> Iterator[str]:
    yield from (note for note in (floors, drawn) if note)
    if load > BUSY:
        yield f"the machine was not idle when the run began: its load was {load:.2f}"
