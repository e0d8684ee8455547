"""The charts of a report as inline SVG: bars, stacked bars, rows of dots, and lines with points.

Colours are classes (``s0`` … ``s8``, ``own``, ``rest``), which the page's style gives their values; figures are in the
unit that the axis names. Lengths start at zero. Every mark has its figure as a title, every chart says what it shows.
"""

__all__ = ["COLOURS", "Dots", "Item", "Line", "Stack", "bar_chart", "dot_chart", "line_chart", "stacked_chart"]

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sdxl_trt.benchmarks.report.svg import LETTER, Scale, element, markup, nice_ticks, shortened, tick_label, words

COLOURS = 8
WIDTH = 440.0
TITLE, SIZE, SMALL = 14.0, 12.0, 11.0
_ROW, _THICK = 38.0, 14.0


@dataclass(frozen=True)
class Item:
    """A bar: its value, half its spread as a share of it, and how it is said; `own` stands out."""

    label: str
    value: float
    said: str
    spread: float = 0.0
    own: bool = False


@dataclass(frozen=True)
class Stack:
    """A bar of parts, in their order, and how their sum is said."""

    label: str
    parts: Mapping[str, float]
    said: str
    own: bool = False


@dataclass(frozen=True)
class Dots:
    """A row of dots, one a kind; None lies beyond the axis."""

    label: str
    values: Mapping[str, float | None]


@dataclass(frozen=True)
class Line:
    """Points (x, y, half the spread as a share of y) in the order of x; `colour` is the number of the contestant."""

    label: str
    points: tuple[tuple[float, float, float], ...]
    colour: int


def bar_chart(title: str, items: Sequence[Item], axis: str, mark: tuple[float, str] | None = None) -> str:
    """Return a chart of horizontal bars with their spreads; `mark` is a value to hold them against, and its name."""
    marks = [("mark", mark[1])] if mark else []
    highest = max([*(item.value * (1 + item.spread) for item in items), mark[0] if mark else 0.0])
    rows = _Rows(title, axis, nice_ticks(0.0, highest, 5), marks, len(items))
    for number, item in enumerate(items):
        rows.label(number, item.label, item.said, own=item.own)
        rows.bar(number, 0.0, item.value, "own" if item.own else "rest", f"{item.label}: {item.said}")
        if item.spread > 0:
            rows.whisker(number, item.value, item.spread)
    if mark:
        rows.mark(mark[0])
    return rows.done()


def stacked_chart(title: str, stacks: Sequence[Stack], axis: str) -> str:
    """Return a chart of horizontal bars, each made of parts; the same part has the same colour in all."""
    names = list(dict.fromkeys(name for stack in stacks for name in stack.parts))
    highest = max(sum(stack.parts.values()) for stack in stacks)
    legend = [(_colour(number), name) for number, name in enumerate(names)]
    rows = _Rows(title, axis, nice_ticks(0.0, highest, 5), legend, len(stacks))
    for number, stack in enumerate(stacks):
        rows.label(number, stack.label, stack.said, own=stack.own)
        start = 0.0
        for name, value in stack.parts.items():
            said = f"{stack.label}, {name}: {tick_label(float(f'{value:.3g}'))} {axis}"
            rows.bar(number, start, start + value, _colour(names.index(name)), said)
            start += value
    return rows.done()


def dot_chart(title: str, rows: Sequence[Dots], axis: str, limits: Mapping[str, float] | None = None) -> str:
    """Return a chart of a row a label with a dot a kind.

    A tick is what was asked: of one kind in its colour, or in the text's where the same was asked of several.
    """
    kinds = list(dict.fromkeys(kind for row in rows for kind in row.values))
    asked = {kind: limit for kind, limit in (limits or {}).items() if kind in kinds}
    values = [value for row in rows for value in row.values.values() if value is not None] + list(asked.values())
    legend = [(_colour(number), kind) for number, kind in enumerate(kinds)]
    same = len(asked) > 1 and len(set(asked.values())) == 1
    if same:
        asked = {"": asked.popitem()[1]}
        legend.append(("mark", f"asked: {tick_label(asked[''])} {axis}"))
    chart = _Rows(title, axis, nice_ticks(min(values), max(values), 5), legend, len(rows), beyond=30.0)
    for number, row in enumerate(rows):
        chart.label(number, row.label, "")
        for kind, limit in asked.items():
            colour = "mark" if same else _colour(kinds.index(kind))
            chart.tick(number, limit, colour, f"asked: {tick_label(limit)} {axis}")
        for kind, value in row.values.items():
            chart.dot(number, value, _colour(kinds.index(kind)), f"{row.label}, {kind}", axis)
    return chart.done()


def line_chart(
    title: str, lines: Sequence[Line], axes: tuple[str, str], x_ticks: Mapping[float, str] | None = None
) -> str:
    """Return a chart of lines with points and their spreads over (x, y) `axes`, both from zero.

    `x_ticks` names the places of x that have a name of their own; the others are at round numbers.
    """
    points = [point for line in lines for point in line.points]
    legend, top = _legend([(_colour(line.colour), line.label) for line in lines], 34.0)
    x_marks = dict(x_ticks or {tick: tick_label(tick) for tick in nice_ticks(0.0, max(x for x, _, _ in points), 5)})
    y_marks = nice_ticks(0.0, max(y * (1 + spread) for _, y, spread in points))
    labels = _with_unit(y_marks, axes[1])
    margin = 12 + max(len(label) for label in labels) * SMALL * LETTER
    x = Scale(0.0, max(x_marks), margin, WIDTH - 18)
    y = Scale(0.0, y_marks[-1], top + 200, top + 10)
    drawn = [
        legend,
        *(element("path", d=f"M{x.start:.1f} {y(tick):.1f}H{x.end}", class_="grid") for tick in y_marks),
        *(_axis(margin - 6, y(tick) + 4, label, "end") for tick, label in zip(y_marks, labels, strict=True)),
        *_labels(x_marks, x, y.start + 17),
        _axis(x.end, y.start + 34, axes[0], "end"),
        *(_drawn(line, x, y, axes) for line in lines),
    ]
    return _chart(title, y.start + 42, drawn)


def _with_unit(ticks: Sequence[float], unit: str) -> list[str]:
    """Return the ticks' labels; the last one says the unit."""
    return [*(tick_label(tick) for tick in ticks[:-1]), f"{tick_label(ticks[-1])} {unit}"]


def _labels(marks: Mapping[float, str], scale: Scale, y: float) -> Iterable[str]:
    """Yield the labels of a horizontal axis that do not touch the one before."""
    free = 0.0
    for value, label in sorted(marks.items()):
        half = len(label) * SMALL * LETTER / 2
        at = min(max(scale(value), half + 1), WIDTH - half - 1)
        if at - half >= free:
            free = at + half + 6
            yield _axis(at, y, label, "middle")


def _drawn(line: Line, x: Scale, y: Scale, axes: tuple[str, str]) -> str:
    path = "M" + "L".join(f"{x(at):.1f} {y(value):.1f}" for at, value, _ in line.points)
    marks = [element("path", d=path, class_="line")]
    for at, value, spread in line.points:
        said = f"{line.label}: {tick_label(float(f'{value:.3g}'))} {axes[1]} at {tick_label(at)} {axes[0]}"
        ends = [y(value * (1 - spread)), y(value * (1 + spread))]
        marks.append(element("path", d=f"M{x(at):.1f} {ends[0]:.1f}V{ends[1]:.1f}", class_="line"))
        marks.append(element("circle", _title(said), cx=x(at), cy=y(value), r=4))
    return element("g", *marks, class_=_colour(line.colour))


class _Rows:
    """A chart of rows under each other: a line of words, and a bar or dots under it, over one horizontal axis."""

    def __init__(
        self, title: str, axis: str, ticks: list[float], legend: list[tuple[str, str]], count: int, beyond: float = 0.0
    ) -> None:
        self._title, self._count = title, count
        drawn, self._top = _legend(legend, 34.0)
        self._scale = Scale(ticks[0], ticks[-1], 4.0, WIDTH - 14 - beyond)
        self._bottom = self._top + count * _ROW + 4
        self._parts = [drawn]
        for tick in ticks:
            at = self._scale(tick)
            self._parts.append(element("path", d=f"M{at:.1f} {self._top}V{self._bottom}", class_="grid"))
        marks = dict(zip(ticks, _with_unit(ticks, axis), strict=True))
        self._parts += _labels(marks, self._scale, self._bottom + 15)

    def label(self, number: int, label: str, said: str, *, own: bool = False) -> None:
        """Write the line of words of a row."""
        y, weight = self._top + number * _ROW + 13, "own-label" if own else "label"
        room = WIDTH - 8 - (len(said) + 3) * SIZE * LETTER
        full = _title(label)
        self._parts.append(words(4, y, shortened(label, room, SIZE), full, class_=weight, font_size=SIZE))
        if said:
            at = WIDTH - 14
            self._parts.append(words(at, y, said, class_=f"{weight} figure", font_size=SIZE, text_anchor="end"))

    def bar(self, number: int, start: float, end: float, colour: str, said: str) -> None:
        """Draw a bar between two values."""
        left, right = self._scale(start), self._scale(end)
        y = self._middle(number) - _THICK / 2
        rectangle = element(
            "rect", _title(said), x=left, y=y, width=max(0.5, right - left), height=_THICK, class_=f"bar {colour}"
        )
        self._parts.append(rectangle)

    def whisker(self, number: int, value: float, spread: float) -> None:
        """Draw the spread of a bar's end."""
        low, high, y = self._scale(value * (1 - spread)), self._scale(value * (1 + spread)), self._middle(number)
        path = f"M{low:.1f} {y - 3}V{y + 3}M{low:.1f} {y}H{high:.1f}M{high:.1f} {y - 3}V{y + 3}"
        self._parts.append(element("path", d=path, class_="whisker"))

    def mark(self, value: float) -> None:
        """Draw a line over the bars of all rows."""
        at = self._scale(value)
        ends = [(self._middle(number) - 9, self._middle(number) + 9) for number in range(self._count)]
        path = "".join(f"M{at:.1f} {top:g}V{bottom:g}" for top, bottom in ends)
        self._parts.append(element("path", d=path, class_="mark"))

    def tick(self, number: int, value: float, colour: str, said: str) -> None:
        """Draw a short line in a row."""
        at, y = self._scale(value), self._middle(number)
        self._parts.append(element("path", _title(said), d=f"M{at:.1f} {y - 8}V{y + 8}", class_=f"asked {colour}"))

    def dot(self, number: int, value: float | None, colour: str, said: str, axis: str) -> None:
        """Draw a dot, beyond the axis for None."""
        at = WIDTH - 22 if value is None else self._scale(value)
        figure = "equal" if value is None else f"{tick_label(float(f'{value:.4g}'))} {axis}"
        dot = element(
            "circle", _title(f"{said}: {figure}"), cx=at, cy=self._middle(number), r=5, class_=f"dot {colour}"
        )
        if value is None:
            self._parts.append(_axis(at, self._middle(number) - 10, "equal", "middle"))
        self._parts.append(dot)

    def done(self) -> str:
        """Return the chart."""
        return _chart(self._title, self._bottom + 24, self._parts)

    def _middle(self, number: int) -> float:
        return self._top + number * _ROW + 19 + _THICK / 2


def _axis(x: float, y: float, text: str, anchor: str) -> str:
    return words(x, y, text, class_="axis", font_size=SMALL, text_anchor=anchor)


def _legend(entries: Sequence[tuple[str, str]], top: float) -> tuple[str, float]:
    """Return the colours with their names, in as many lines as it takes, and where the chart goes on below them."""
    parts, x, y = [], 4.0, top
    for colour, name in entries:
        label = shortened(name, WIDTH - 40, SMALL)
        width = 17 + len(label) * SMALL * LETTER + 12
        if x > 4 and x + width > WIDTH:
            x, y = 4.0, y + 18
        parts.append(element("rect", x=x, y=y - 1, width=11, height=11, rx=2, class_=f"chip {colour}"))
        parts.append(words(x + 16, y + 9, label, _title(name), class_="label", font_size=SMALL))
        x += width
    return "".join(parts), y + 22 if entries else top - 4


def _chart(title: str, height: float, parts: Iterable[str]) -> str:
    heading = words(4, 16, shortened(title, WIDTH - 8, TITLE), _title(title), class_="title", font_size=TITLE)
    return element(
        "svg", heading, *parts, viewBox=f"0 0 {WIDTH:g} {height:g}", role="img", aria_label=title, class_="chart"
    )


def _title(text: str) -> str:
    return element("title", markup(text))


def _colour(number: int) -> str:
    return f"s{min(number, COLOURS)}"
