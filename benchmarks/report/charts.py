"""Which of a report's figures are drawn, and in which section: a chart that would have nothing to show is left out."""

__all__ = ["charts"]

import math
from collections.abc import Callable, Sequence

from sdxl_trt.benchmarks.report.plots import (  # fmt: skip
    COLOURS,
    Dots,
    Item,
    Line,
    Stack,
    bar_chart,
    dot_chart,
    line_chart,
    stacked_chart,
)
from sdxl_trt.benchmarks.report.quantities import time_unit
from sdxl_trt.benchmarks.report.records import BenchReport, Measurement
from sdxl_trt.benchmarks.report.timed import PICTURE, labels, our_names, series, shape_words, spread_words, tasks

MEGA = 1e6


def charts(report: BenchReport) -> dict[str, list[str]]:
    """Return the charts of each section, by its key, as SVG."""
    found = {
        "pictures": [_stages(report), *_sweeps(report, PICTURE)],
        "parts": [chart for what in tasks(report) if what != PICTURE for chart in _task(report, what)],
        "cold": [_cold(report)],
        "quality": [_quality(report)],
    }
    return {key: [chart for chart in drawn if chart] for key, drawn in found.items()}


def _stages(report: BenchReport) -> str:
    staged = [one for one in series(report, PICTURE) if any(_drawable(value) for value in one.stages.values())]
    if not staged:
        return ""
    unit, named, ours = time_unit(sum(one.stages.values()) for one in staged), labels(report), our_names(report)
    kept = _largest(staged)
    stacks = []
    for one in staged:
        parts = {stage: value / unit.size for stage, value in one.stages.items() if stage in kept and _drawable(value)}
        rest = sum(value for stage, value in one.stages.items() if stage not in kept and _drawable(value))
        parts |= {"other": rest / unit.size} if rest else {}
        stacks.append(Stack(named[one.contestant], parts, unit.show(sum(one.stages.values())), one.contestant in ours))
    return stacked_chart("picture: where its time goes", stacks, unit.name)


def _largest(staged: Sequence[Measurement]) -> set[str]:
    """Return the stages that get a colour of their own: the longest ones where there are too many."""
    names = dict.fromkeys(stage for one in staged for stage in one.stages)
    order = sorted(names, key=lambda stage: -max(one.stages.get(stage, 0.0) for one in staged))
    return set(order if len(order) <= COLOURS else order[: COLOURS - 1])


def _sweeps(report: BenchReport, what: str) -> list[str]:
    def pixels(one: Measurement) -> float:
        return one.width * one.height / MEGA

    sizes = {pixels(one): _side(one) for one in report.measurements if one.what == what}
    return [
        _sweep(report, what, "batch", "pictures at once", lambda one: float(one.batch)),
        _sweep(report, what, "size", "pixels", pixels, sizes),
        _sweep(report, what, "handoff", "share of the base (1: the base alone)", _base_share),
    ]


def _side(one: Measurement) -> str:
    return f"{one.width}²" if one.width == one.height else f"{one.width}×{one.height}"


def _base_share(one: Measurement) -> float:
    return 1.0 if one.handoff is None else one.handoff


def _sweep(
    report: BenchReport,
    what: str,
    sweep: str,
    axis: str,
    place: Callable[[Measurement], float],
    names: dict[float, str] | None = None,
) -> str:
    """Return time against what a sweep varies, or nothing where no contestant has two points of it."""
    varied = [one for one in series(report, what, sweep) if _drawable(one.median)]
    compared = {one.contestant: one for one in series(report, what)} if sweep != "handoff" else {}
    unit = time_unit(one.median for one in varied)
    lines = []
    for colour, (name, label) in enumerate(labels(report).items()):
        points = {place(one): one for one in varied if one.contestant == name}
        if points and name in compared:
            # What all contestants are compared in is a point of the series too.
            points.setdefault(place(compared[name]), compared[name])
        if len(points) > 1:
            drawn = tuple((at, one.median / unit.size, one.spread) for at, one in sorted(points.items()))
            lines.append(Line(label, drawn, colour))
    if not lines:
        return ""
    used = {at for line in lines for at, _, _ in line.points}
    if sweep == "batch":
        names = {at: f"{at:g}" for at in used}
    shape = {shape_words(one) for one in varied}
    title = f"{what}: time against {sweep}" + (f" ({shape.pop()})" if len(shape) == 1 else "")
    marks = {at: name for at, name in names.items() if at in used} if names else None
    return line_chart(title, lines, (axis, unit.name), marks)


def _task(report: BenchReport, what: str) -> list[str]:
    compared = [one for one in series(report, what) if _drawable(one.median)]
    found = []
    if compared:
        named, ours, floor = labels(report), our_names(report), report.floors.get(what, 0.0)
        unit = time_unit(one.median for one in compared)
        items = [
            Item(
                named[one.contestant], one.median / unit.size, f"{unit.show(one.median)} {spread_words(one)}".strip(),
                one.spread, one.contestant in ours,
            )
            for one in compared
        ]  # fmt: skip
        mark = (floor / unit.size, f"floor: {unit.show(floor)}") if floor > 0 and _drawable(floor) else None
        found.append(bar_chart(what, items, unit.name, mark))
    return found + [chart for chart in _sweeps(report, what) if chart]


def _cold(report: BenchReport) -> str:
    there = [one for one in report.cold_starts if one.seconds and not one.missing and _drawable(one.median)]
    if not there:
        return ""
    unit = time_unit(one.median for one in there)
    items = [
        Item(
            one.name, one.median / unit.size, f"{unit.show(one.median)} {spread_words(one)}".strip(), one.spread,
            one is there[0],
        )
        for one in there
    ]  # fmt: skip
    return bar_chart("from the command to the first picture", items, unit.name)


def _quality(report: BenchReport) -> str:
    rows: dict[str, dict[str, float | None]] = {}
    limits: dict[str, set[float]] = {}
    for one in report.quality:
        if one.missing:
            continue
        if one.passed if one.psnr is None else math.isfinite(one.psnr):
            rows.setdefault(one.variant, {})[one.stage] = one.psnr
        if one.limit is not None and math.isfinite(one.limit):
            limits.setdefault(one.stage, set()).add(one.limit)
    if not any(value is not None for row in rows.values() for value in row.values()):
        return ""
    shared = {stage: found.pop() for stage, found in limits.items() if len(found) == 1}
    dots = [Dots(variant, values) for variant, values in rows.items()]
    return dot_chart("precision against quality", dots, "dB PSNR", shared)


def _drawable(value: float) -> bool:
    return math.isfinite(value) and 0 < value < 1e100
