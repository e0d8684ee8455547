"""The benchmark of a checkout, ``make bench``: under an hour on two cores, most of it compiling the baselines.

A 50-million-parameter cousin of SDXL at 512² stands in for the model: its UNet step and a short end-to-end run are
timed for all contestants. Cold start and quality use the embedded pair, which is trained and draws real pictures.
Writes ``benchmarks/results/bench.json``, ``.md`` and ``.html``, and warns if ratios disagree with the previous ones.
"""

__all__ = ["main"]

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from sdxl_trt.benchmarks.contest import (
    PRESETS,
    ROSTER,
    BenchOptions,
    agree,
    bench_bars,
    cold_starts,
    run_bench,
    settled_spec,
)
from sdxl_trt.benchmarks.full_size import checkpoint_pair
from sdxl_trt.benchmarks.measure import RESULTS_FOLDER, Subject, bars_table, find_subject, missed
from sdxl_trt.benchmarks.report import BenchReport, BenchSettings, Quality, read_report, require_matplotlib, write_pages
from sdxl_trt.engines import VerificationError
from sdxl_trt.engines.host import Parser, run

COMMAND = ("make", "bench")
RESULTS = RESULTS_FOLDER / "bench.json"
# A preset of four steps would draw with two: the presets are compared in whole pictures, by `make bench-pareto`.
AGAINST = ",".join(name for name in ROSTER if name not in PRESETS)
COUSIN = (
    "cousin-50m",
    BenchOptions(AGAINST, steps=4, width=512, height=512, runs=5, step_runs=12, components=True, sweeps=True),
)
TINY = ("tiny", BenchOptions(steps=3, width=128, height=128, runs=2, step_runs=3, components=True, sweeps=True,
                        quick=True))  # fmt: skip
EMBEDDED = BenchOptions(steps=30)
COLD_RUNS = 5


def main(argv: list[str] | None = None) -> int:
    """Measure, write the results and return the exit code: 1 if a bar was missed."""
    parser = Parser(prog="python -m sdxl_trt.benchmarks.ten_minutes", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("out/bench"), help="folder for checkpoints, kept for reruns")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file to write; the pages go beside it")
    parser.add_argument("--quick", action="store_true", help="a tiny model: tests the benchmark; timings mean nothing")
    parser.add_argument("--no-quality", action="store_true", help="skip the quality measurement")
    parser.add_argument("--debug", action="store_true", help="add the traceback to an error")
    return run(parser, _bench, argv)


def _bench(arguments: argparse.Namespace) -> None:
    require_matplotlib()
    report = _run(arguments.work, quick=arguments.quick, quality=not arguments.no_quality)
    disagreeing = _disagreeing(arguments.results, report)
    write_pages(report, arguments.results.parent, arguments.results.stem)
    sys.stdout.write("\n".join(bars_table(report.bars)) + "\n")
    for line in disagreeing:
        sys.stderr.write(f"warning: outside the spread of the previous results: {line}\n")
    if missed(report.bars) and not arguments.quick:
        raise VerificationError(f"a bar was missed; {arguments.results} has the figures")


def _run(work: Path, *, quick: bool, quality: bool) -> BenchReport:
    size, options = TINY if quick else COUSIN
    base, refiner = checkpoint_pair(work / "checkpoints" / size, size, _say)
    subject = find_subject(None, str(base), str(refiner), work, _say)
    subject = replace(subject, name="exported from it in fp32", model=size)
    report = run_bench(subject, options, _say)
    embedded = find_subject(None, None, None, work, _say)
    spec = settled_spec(embedded, replace(EMBEDDED, steps=3) if quick else EMBEDDED)
    starts, drawn = cold_starts(embedded, spec, 1 if quick else COLD_RUNS, say=_say)
    context = (
        f"the model is {size}, random weights in SDXL's architecture: its pictures are noise, its time is not",
        f"cold start and quality are the embedded pair's, {spec.width}×{spec.height} and {spec.steps} steps",
    )
    notes = tuple(note for note in (*context, drawn, *report.notes) if note)
    report = msgspec.structs.replace(report, cold_starts=starts, command=COMMAND, notes=notes)
    report = msgspec.structs.replace(report, bars=bench_bars(report))
    if not quality:
        return report
    # Quality comes last: loading PyTorch makes this process large.
    settings = msgspec.structs.replace(report.settings, model=embedded.model, bundle=embedded.name, width=spec.width,
                                       height=spec.height, steps=spec.steps)  # fmt: skip
    return msgspec.structs.replace(report, quality=_quality(embedded, settings, quick=quick))


def _quality(embedded: Subject, settings: BenchSettings, *, quick: bool) -> tuple[Quality, ...]:
    from sdxl_trt.benchmarks.quality import VARIANTS, measure_quality  # noqa: PLC0415

    return measure_quality(embedded, settings, () if quick else tuple(VARIANTS), _say)


def _disagreeing(path: Path, report: BenchReport) -> Sequence[str]:
    """Return the ratios in which `report` disagrees with `path`, if that has the same settings and processor."""
    if not path.exists():
        return []
    before = read_report(path)
    same = all(before.machine.get(fact) == report.machine.get(fact) for fact in ("processor", "cores"))
    return agree(before, report) if same and before.settings == report.settings else []


def _say(text: str) -> None:
    if ": round " not in text:
        sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main())
