"""The tables of timings: one per task and one per sweep, with every contestant's figures and ratios."""

__all__ = [
    "PICTURE",
    "labels",
    "our_names",
    "series",
    "shape_words",
    "spread_words",
    "stage_table",
    "task_tables",
    "tasks",
]

from collections.abc import Callable, Iterable, Sequence

from sdxl_trt.benchmarks.report.document import Table, without_empty
from sdxl_trt.benchmarks.report.quantities import Unit, memory, significant, time_unit, times
from sdxl_trt.benchmarks.report.records import BenchReport, Contestant, Measurement, Timed

PICTURE = "picture"
Column = tuple[str, Callable[[Measurement], str]]


def labels(report: BenchReport) -> dict[str, str]:
    """Return each contestant's label: its title and precision, plus its name if two would have the same label."""
    said = {one.name: _title(one) for one in report.contestants}
    said = {
        name: f"{label} ({name})" if list(said.values()).count(label) > 1 else label for name, label in said.items()
    }
    return said | {one.contestant: one.contestant for one in report.measurements if one.contestant not in said}


def _title(contestant: Contestant) -> str:
    title = contestant.title or contestant.name
    if not contestant.precision or contestant.precision in title:
        return title
    return f"{title}, {contestant.precision}"


def our_names(report: BenchReport) -> list[str]:
    """Return this project's contestants: those in the numerators of ratios, or without ratios the first contestant."""
    held = dict.fromkeys(ratio.contestant for ratio in report.ratios)
    return list(held) or [one.name for one in report.contestants[:1]]


def tasks(report: BenchReport) -> list[str]:
    """Return the tasks that were timed, "picture" first."""
    found = dict.fromkeys(one.what for one in report.measurements if one.seconds)
    return sorted(found, key=lambda what: what != PICTURE)


def series(report: BenchReport, what: str, sweep: str = "") -> list[Measurement]:
    """Return the measurements of a task and sweep that have runs, in the order of the contestants."""
    order = list(labels(report))
    found = [one for one in report.measurements if (one.what, one.sweep) == (what, sweep) and one.seconds]
    return sorted(found, key=lambda one: order.index(one.contestant))


def shape_words(one: Measurement) -> str:
    """Return pixels, batch and the rows of a UNet call as text, without the setting that a sweep varies."""
    words = {"size": f"{one.width}×{one.height}", "batch": f"batch {one.batch}"}
    words |= {"rows": f"{one.rows} rows"} if one.rows and one.sweep != "batch" else {}
    return ", ".join(text for what, text in words.items() if what != one.sweep)


def task_tables(report: BenchReport, what: str) -> list[Table]:
    """Return the tables of a task: the comparison of contestants, then one for each sweep."""
    found = []
    compared = series(report, what)
    if compared:
        columns = [*_times(compared), *_ratios(report, what), *_floor(report, what), *_rest(report, what)]
        found.append(_table(report, what, compared, columns))
    for sweep in dict.fromkeys(one.sweep for one in report.measurements if one.what == what and one.sweep):
        varied = series(report, what, sweep)
        if varied:
            columns = [(sweep, _varied(sweep)), *_times(varied), *_rest(report, what)]
            found.append(_table(report, f"{what}, by {sweep}", varied, columns))
    return found


def _table(report: BenchReport, title: str, measurements: Sequence[Measurement], columns: Iterable[Column]) -> Table:
    named, ours = labels(report), our_names(report)
    shapes = {shape_words(one) for one in measurements}
    caption = f"{title}: {shapes.pop()}" if len(shapes) == 1 else title
    shown = [*columns, ("settings", shape_words)] if shapes else list(columns)
    rows = [[named[one.contestant], *(show(one) for _, show in shown)] for one in measurements]
    head, filled = without_empty(["", *(name for name, _ in shown)], rows)
    marked = frozenset(number for number, one in enumerate(measurements) if one.contestant in ours)
    return Table(head, filled, caption, ours=marked)


def spread_words(one: Timed) -> str:
    """Return the spread in percent of the median, or "" for a single run."""
    return f"±{one.spread:.1%}".replace("%", " %") if len(one.seconds) > 1 else ""


def _times(measurements: Iterable[Measurement]) -> list[Column]:
    unit = time_unit(one.median for one in measurements)
    return [
        ("median", lambda one: unit.show(one.median)),
        ("spread", spread_words),
        ("p95", lambda one: unit.show(one.p95)),
        ("runs", lambda one: str(len(one.seconds))),
    ]


def _ratios(report: BenchReport, what: str) -> list[Column]:
    """Return a column for each of our contestants: its time divided by the row's, with the spread."""
    found: dict[str, dict[str, str]] = {}
    for ratio in report.ratios:
        if ratio.what == what:
            shown = f"{times(ratio.median)} ({significant(ratio.low)}–{significant(ratio.high)})"
            found.setdefault(ratio.contestant, {})[ratio.against] = shown
    return [(f"{name} / this", _looked_up(column)) for name, column in found.items()]


def _looked_up(column: dict[str, str]) -> Callable[[Measurement], str]:
    return lambda one: column.get(one.contestant, "")


def _floor(report: BenchReport, what: str) -> list[Column]:
    floor = report.floors.get(what, 0.0)
    if floor <= 0:
        return []
    return [(f"over the floor of {time_unit([floor]).show(floor)}", lambda one: times(one.median / floor))]


def _rest(report: BenchReport, what: str) -> list[Column]:
    contestants = {one.name: one for one in report.contestants}

    def size(one: Measurement, figure: str) -> str:
        found = getattr(contestants.get(one.contestant), figure, None)
        return "" if found is None or one.sweep else memory(found)

    found: list[Column] = [
        ("energy per run", lambda one: "" if one.joules is None else Unit("J").show(one.joules)),
        ("largest difference", lambda one: "" if one.difference is None else significant(one.difference, 2)),
    ]
    if what != PICTURE:
        return found
    rate: Column = (
        "pictures/s",
        lambda one: significant((one.pictures or one.batch) / one.median) if one.median else "",
    )
    return [
        rate,
        *found,
        ("peak RSS", lambda one: size(one, "peak_rss")),
        ("peak GPU", lambda one: size(one, "peak_gpu")),
    ]


def _varied(sweep: str) -> Callable[[Measurement], str]:
    if sweep == "handoff":
        return lambda one: "base alone" if one.handoff is None else f"{one.handoff:g}"
    if sweep == "batch":
        return lambda one: str(one.batch)
    return lambda one: f"{one.width}×{one.height}"


def stage_table(report: BenchReport) -> Table | None:
    """Return the seconds of each stage of every contestant's median picture, or None if no stages were recorded."""
    staged = [one for one in series(report, PICTURE) if one.stages]
    if not staged:
        return None
    named, ours = labels(report), our_names(report)
    stages = list(dict.fromkeys(stage for one in staged for stage in one.stages))
    units = {stage: time_unit(one.stages.get(stage, 0.0) for one in staged) for stage in stages}
    unit = time_unit(sum(one.stages.values()) for one in staged)
    rows = [
        [
            named[one.contestant],
            *(units[stage].show(one.stages[stage]) if stage in one.stages else "" for stage in stages),
            unit.show(sum(one.stages.values())),
        ]
        for one in staged
    ]
    head, filled = without_empty(["", *stages, "total"], rows)
    marked = frozenset(number for number, one in enumerate(staged) if one.contestant in ours)
    return Table(head, filled, "stages of the median picture", ours=marked)
