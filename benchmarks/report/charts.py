"""The charts of a report, by section. Bars and axes of time start at zero; the title of a mark states its figure."""

__all__ = ["charts"]

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from sdxl_trt.benchmarks.report.figures import SAID, axes_of, coloured, drawn, styled
from sdxl_trt.benchmarks.report.quantities import Unit, plain, significant, time_unit
from sdxl_trt.benchmarks.report.records import BenchReport, Measurement, Quality, Timed
from sdxl_trt.benchmarks.report.style import LIGHT
from sdxl_trt.benchmarks.report.timed import PICTURE, labels, our_names, series, shape_words, spread_words, tasks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SWEEPS: dict[str, tuple[str, Callable[[Measurement], tuple[float, str]]]] = {
    "batch": ("pictures at once", lambda one: (one.batch, f"{one.batch}")),
    "size": ("pixels", lambda one: (one.width * one.height, f"{one.width}×{one.height}")),
    "handoff": ("share of the base (1: the base alone)", lambda one: (_share(one), f"{_share(one):g}")),
}
"""The name of a sweep's axis, and the x of a measurement on it with the name of that x."""


class _Bar(NamedTuple):
    """A bar: seconds by kind, with the kind "" for a plain bar, and the runs that its spread is computed from."""

    label: str
    own: bool
    parts: Mapping[str, float]
    runs: Timed


def charts(report: BenchReport) -> dict[str, list[str]]:
    """Return {section: charts as <figure> elements}, without charts that would be empty."""
    cold = [one for one in report.cold_starts if one.seconds and not one.missing]
    bars = [_Bar(one.name, one is cold[0], {"": one.median}, one) for one in cold]
    with styled():
        found = {
            "pictures": _task(report, PICTURE),
            "parts": [chart for what in tasks(report) if what != PICTURE for chart in _task(report, what)],
            "cold": [_bars("from the command to the first picture", bars)],
            "quality": [_quality(report)],
        }
    return {section: [chart for chart in made if chart] for section, made in found.items()}


def _task(report: BenchReport, what: str) -> list[str]:
    """Return a chart of each contestant's time for a task (a picture's by stage), then one a sweep; "" if empty."""
    named, ours, bars = labels(report), our_names(report), []
    for one in series(report, what):
        parts, runs = (one.stages, Timed(seconds=())) if what == PICTURE else ({"": one.median}, one)
        bars.append(_Bar(named[one.contestant], one.contestant in ours, parts, runs))
    title = f"{what}: where its time goes" if what == PICTURE else what
    return [_bars(title, bars, report.floors.get(what, 0.0)), *(_sweep(report, what, sweep) for sweep in SWEEPS)]


def _bars(title: str, given: Iterable[_Bar], floor: float = 0.0) -> str:
    """Return a chart of horizontal bars with their spreads and a tick at the floor, or "" if no bar can be drawn."""
    sums = [(bar, sum(bar.parts.values())) for bar in given]
    bars = [(bar, end) for bar, end in sums if _drawable(end * (1 + bar.runs.spread))]
    if not bars:
        return ""
    unit, kinds = time_unit(end for _, end in bars), coloured(kind for bar, _ in bars for kind in bar.parts if kind)
    words = [(bar.label, f"{unit.show(end)} {spread_words(bar.runs)}".strip(), bar.own) for bar, end in bars]
    axes, mark = _rows(words, 36, unit), f"floor: {unit.show(floor)}"
    for row, (bar, end) in enumerate(bars):
        y, start, spread = 36 * row + 25, 0.0, end * bar.runs.spread
        for kind, seconds in bar.parts.items():
            said = f"{SAID}{bar.label}{kind and ', '}{kind}: {unit.show(seconds)} {spread_words(bar.runs)}"
            colour = kinds.get(kind, LIGHT["own" if bar.own else "rest"])
            axes.barh(y, seconds, 14, start, color=colour, ec=LIGHT["card"], gid=said)
            start += seconds
        if spread:
            tips = [max(0.0, end - spread)] * 3 + [end + spread] * 3
            axes.plot(tips, [y - 3, y + 3, y, y, y - 3, y + 3], color=LIGHT["text"], lw=1.25)
        if _drawable(floor):
            axes.plot([floor, floor], [y - 8, y + 9], color=LIGHT["text"], lw=2, gid=SAID + mark)
    return drawn(title, kinds | ({mark: LIGHT["text"]} if _drawable(floor) else {}), axes)


def _sweep(report: BenchReport, what: str, sweep: str) -> str:
    """Return a chart of time over a sweep's sizes, batches or handoffs, or "" if no contestant has two points."""
    (axis, place), swept = SWEEPS[sweep], series(report, what, sweep)
    # The batch of the other charts is a point too: the sweep may lack it.
    varied = [*(series(report, what) if sweep == "batch" else ()), *swept]
    varied = [one for one in varied if _drawable(one.median * (1 + one.spread))]
    lines: dict[str, dict[tuple[float, str], Measurement]] = defaultdict(dict)
    for one in sorted(varied, key=place):
        lines[labels(report)[one.contestant]][place(one)] = one
    colours = {label: colour for label, colour in coloured(labels(report).values()).items() if len(lines[label]) > 1}
    if not colours:
        return ""
    unit = time_unit(one.median for one in varied)
    axes = axes_of(220, left=52, right=32, bottom=38, top=16)
    axes.set_xlabel(axis, loc="right")
    axes.yaxis.set_major_formatter(lambda seconds, _: f"{seconds / unit.size:g} {unit.name}")
    axes.xaxis.set_major_formatter("{x:g}")
    if sweep != "handoff":
        axes.set_xticks(*zip(*sorted({point for label in colours for point in lines[label]}), strict=True))
    axes.grid(visible=False, axis="x")
    axes.update_datalim([(0, 0)])
    for label, colour in colours.items():
        medians = [one.median for one in lines[label].values()]
        axes.plot([at for at, _ in lines[label]], medians, color=colour, lw=2)
        for (at, name), one in lines[label].items():
            ends, said = (max(0.0, 1 - one.spread), 1 + one.spread), f"{label}: {unit.show(one.median)} at {name}"
            axes.plot([at, at], [one.median * end for end in ends], color=colour, lw=2)
            axes.plot([at, at], [one.median] * 2, color=colour, lw=8, gid=f"{SAID}{said} {axis}")
            if len(colours) == 1:
                words = significant(one.median / unit.size)
                axes.annotate(words, (at, one.median), (0, 8), textcoords="offset points", ha="center")
    shapes = {shape_words(one) for one in swept}
    return drawn(f"{what}: time against {sweep}" + (f" ({shapes.pop()})" if len(shapes) == 1 else ""), colours, axes)


def _share(one: Measurement) -> float:
    return 1.0 if one.handoff is None else one.handoff


def _quality(report: BenchReport) -> str:
    """Return a chart with a row per variant and, in each, a dot per stage, joined to a tick at the PSNR asked."""
    rows: dict[str, list[Quality]] = defaultdict(list)
    for one in report.quality:
        if not one.missing and (one.passed if one.psnr is None else math.isfinite(one.psnr)):
            rows[one.variant].append(one)
    if all(one.psnr is None for row in rows.values() for one in row):
        return ""
    kinds = coloured(one.stage for row in rows.values() for one in row)
    height = 28 + 9 * len(kinds)
    axes = _rows([(variant, "", False) for variant in rows], height, Unit("dB"))
    for row, one in ((row, one) for row, stages in enumerate(rows.values()) for one in stages):
        y, colour = row * height + 25 + 9 * list(kinds).index(one.stage), kinds[one.stage]
        said, x, where = f"{SAID}{one.variant}, {one.stage}", one.psnr, axes.transData
        if one.limit and math.isfinite(one.limit):
            axes.plot([one.limit] * 2, [y - 4, y + 4], color=colour, lw=2, gid=f"{said}, asked: {one.limit:g} dB")
            axes.plot([one.limit, one.psnr or one.limit], [y, y], color=colour, lw=1)
        if x is None:
            x, where = 1.03, axes.get_yaxis_transform()
            axes.text(0.99, y, "equal", ha="right", va="center", transform=where)
        figure = "equal" if one.psnr is None else f"{one.psnr:.4g} dB"
        axes.plot([x, x], [y, y], color=colour, lw=8, transform=where, gid=f"{said}: {figure}")
    return drawn("precision against quality: PSNR", kinds | {"tick: asked": LIGHT["text"]}, axes)


def _rows(rows: Sequence[tuple[str, str, bool]], height: float, unit: Unit) -> "Axes":
    """Return axes with rows of `height` points; each begins with its label and, at the right, its figure."""
    axes = axes_of(len(rows) * height + 24, left=6, right=14, bottom=22, top=2)
    axes.set(ylim=(len(rows) * height, 0), yticks=[])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / unit.size:g} {unit.name}")
    for row, (label, figure, bold) in enumerate(rows):
        line, room, weight = plain(label), 54 - len(figure), "bold" if bold else "normal"
        short = line if len(line) <= room else f"{line[: room - 1]}…"
        for x, text, side in ((0, short, "left"), (1, figure, "right")):
            axes.text(x, row * height + 14, text, ha=side, size=12, weight=weight, gid=SAID + label,
                      transform=axes.get_yaxis_transform())  # fmt: skip
    return axes


def _drawable(value: float) -> bool:
    return math.isfinite(value) and 1e-12 < value < 1e100
