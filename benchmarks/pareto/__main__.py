"""Compare settings that draw faster with the full run, on the embedded pair: ``make bench-pareto``.

Steps × cache × guided interval × precision × decoder: every setting draws the same captions from the same noise, in
turns. UNet FLOPs and seconds stand against PSNR to the full run, what is right in the pictures, sharpness and damage.
The settings that have a bar draw all captions, the others the first eighth of them. Writes JSON, Markdown and a page of
HTML. ``--only`` takes patterns of settings, and keeps the other rows of the results if they are of as many captions.

Then whole pictures of a cousin of SDXL are drawn with the presets and by other libraries, in turns, to
``bench_pictures.json`` beside the results; not with ``--only``. ``--pictures`` draws these alone.
"""

__all__ = ["main"]

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from sdxl_trt.benchmarks.measure import (
    RESULTS_FOLDER,
    Bar,
    at_least,
    bars_table,
    machine,
    missed,
    package_versions,
    results_parser,
    write_results,
    write_text,
)
from sdxl_trt.benchmarks.model_card import evaluation_cases, paired_effect, psnr
from sdxl_trt.benchmarks.pareto.drawing import Drawn, draw_in_turns, export_bundles
from sdxl_trt.benchmarks.pareto.page import Difference, Report, Row, frontier, page, table
from sdxl_trt.benchmarks.pareto.pictures import draw_pictures
from sdxl_trt.benchmarks.pareto.points import FULL, POINTS, Point, chosen
from sdxl_trt.engines import SdxlTrtError, UsageError
from sdxl_trt.engines.host import ProgressLine

RESULTS = RESULTS_FOLDER / "pareto.json"
_TURN = 10
_MEASURES = ("right", "sharpness", "damage")
_CACHED, _FEWER = "20 steps, cache 2", ("12 steps", "15 steps")
_BARRED = (FULL, _CACHED, *_FEWER)
_SHARE = 8


def figures(points: Mapping[str, Point], drawn: Mapping[str, Drawn]) -> dict[str, Row]:
    """Return the row of every setting; `drawn` has the full run's pictures too, of at least as many captions."""
    rows = {}
    for name, found in drawn.items():
        full = drawn[FULL].first(len(found.pixels), len(found.unet))
        decibels = [psnr(one, other) for one, other in zip(found.pixels, full.pixels, strict=True)]
        effects = {measure: paired_effect(full.scores, found.scores, measure) for measure in _MEASURES}
        rows[name] = Row(
            kind=points[name].kind,
            captions=len(found.pixels),
            flops=found.flops,
            unet=float(np.median(found.unet)),
            whole=float(np.median(found.whole)),
            unet_ratio=float(np.median(np.divide(found.unet, full.unet))),
            whole_ratio=float(np.median(np.divide(found.whole, full.whole))),
            psnr=float(np.median(decibels)),
            worst=min(decibels),
            right=100 * float(np.mean([score.right for score in found.scores])),
            sharpness=float(np.mean([score.sharpness for score in found.scores])),
            differences={measure: Difference(effect["mean"], effect["low"], effect["high"])
                         for measure, effect in effects.items()},
        )  # fmt: skip
    return rows


def bars(rows: Mapping[str, Row]) -> list[Bar]:
    """Return the bars of step caching; what was not drawn counts as not measured.

    The time that it saves has its bar beside whole pictures, of a model with SDXL's proportions.
    """
    cached = rows.get(_CACHED)
    nearness = None if cached is None else cached.psnr
    what = f"{_CACHED}, against {FULL}"
    decibels = "{:.1f} dB".format
    found = [
        at_least(f"{what}: PSNR, median", nearness, 40.0, "40 dB", decibels),
        Bar(f"{what}: right, 95 % interval", "≥ -1 point or includes 0", *_judged(cached, "right", -0.01)),
        Bar(f"{what}: sharpness, 95 % interval", "includes 0", *_judged(cached, "sharpness", None)),
    ]
    fewer = [rows[name] for name in _FEWER if name in rows]
    gain = None
    if cached is not None and len(fewer) == len(_FEWER):
        low, high = sorted(fewer, key=lambda row: row.unet_ratio)
        share = (cached.unet_ratio - low.unet_ratio) / (high.unet_ratio - low.unet_ratio)
        gain = cached.psnr - (low.psnr + share * (high.psnr - low.psnr))
    found.append(at_least(f"{_CACHED}, against fewer full steps in equal UNet time: PSNR", gain, 3.0, "3 dB", decibels))
    return found


def _judged(row: Row | None, measure: str, least: float | None) -> tuple[str, bool | None]:
    if row is None:
        return "not measured", None
    found = row.differences[measure]
    said = f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f})"
    return said, found.includes_zero or (least is not None and found.mean >= least)


def merged(report: Report, path: Path) -> Report:
    """Return `report` with the rows of the results at `path` that it lacks.

    Raises UsageError if those are of another number of captions, or of other versions.
    """
    if not path.exists():
        return report
    before = msgspec.json.decode(path.read_bytes(), type=Report)
    if (before.captions, before.versions) != (report.captions, report.versions):
        raise UsageError(f"--only: {path} has results of {before.captions} captions or of other versions; draw all"
                         " settings again")  # fmt: skip
    rows = {**before.rows, **report.rows}
    ordered = {name: rows[name] for name in POINTS if name in rows}
    return msgspec.structs.replace(report, rows=ordered, bars=bars(ordered))


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, write the results and return 1 if a bar was missed, else 0."""
    prog = "sdxl_trt.benchmarks.pareto"
    parser = results_parser(prog, __doc__, work=Path("out/bench-pareto"), results=RESULTS, case="setting")
    parser.add_argument("--count", type=int, default=400, help="captions of the settings that have a bar (default 400)")
    parser.add_argument("--pictures", action="store_true", help="only draw whole pictures, beside other libraries")
    arguments = parser.parse_args(argv)
    found: list[Bar] = []
    try:
        if arguments.pictures and arguments.only:
            raise UsageError("--pictures and --only: the settings are not drawn with --pictures; give one of them")
        if not arguments.pictures:
            found += _settings(arguments)
        if not arguments.only:
            found += _pictures(arguments)
    except SdxlTrtError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return exc.exit_code
    return 1 if not arguments.quick and missed(found) else 0


def _settings(arguments: argparse.Namespace) -> list[Bar]:
    """Compare the settings, write the results and return their bars."""
    points = chosen(arguments.only)
    count = 2 if arguments.quick else arguments.count
    with ProgressLine() as line:
        line.draw("bundles", "exporting")
        bundles = export_bundles(list(dict.fromkeys(point.bundle for point in points.values())), arguments.work)
        cases, few = evaluation_cases(count), max(2, count // _SHARE)
        each = {name: cases if name in _BARRED else cases[:few] for name in points}
        drawn = draw_in_turns(points, bundles, each, _TURN, line)
    rows = figures(points, drawn)
    versions = package_versions(("sdxl-trt", "onnxruntime", "openvino", "numpy"))
    report = Report(machine(), versions, count, FULL, rows, bars(rows))
    if arguments.only:
        report = merged(report, arguments.results)
    write_results(report, table(report), arguments.results)
    write_text(page(report), arguments.results.with_suffix(".html"))
    sys.stdout.write(table(report))
    sys.stdout.write(f"\nfrontier, the fastest first: {'; '.join(frontier(report.rows))}\n")
    return report.bars


def _pictures(arguments: argparse.Namespace) -> list[Bar]:
    """Draw whole pictures in turns with other libraries, write the results and return their bars."""
    with ProgressLine() as line:
        report = draw_pictures(
            arguments.work, arguments.results.parent, ("make", "bench-pareto"),
            lambda text: line.draw("pictures", text), quick=arguments.quick,
        )  # fmt: skip
    sys.stdout.write("\n".join(bars_table(report.bars)) + "\n")
    return list(report.bars)


if __name__ == "__main__":
    sys.exit(main())
