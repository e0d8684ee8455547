"""The comparison as records, and as Markdown and a page of HTML with its chart."""

__all__ = ["Difference", "Report", "Row", "frontier", "page", "table"]

from collections.abc import Mapping

import msgspec

from sdxl_trt.benchmarks.measure import VERDICTS, Bar, machine_words
from sdxl_trt.benchmarks.report import (
    LIGHT,
    SAID,
    Section,
    Table,
    axes_of,
    coloured,
    drawn,
    html_page,
    markdown_page,
    styled,
)

COMMAND = "make bench-pareto"
_TITLE = "How much a faster picture differs"
_FRONTIER = LIGHT["rest"]


class Difference(msgspec.Struct, frozen=True):
    """A mean difference to the full run, picture by picture, with its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def includes_zero(self) -> bool:
        """Return whether the interval includes 0."""
        return self.low <= 0.0 <= self.high


class Row(msgspec.Struct, frozen=True):
    """One setting's figures, of its first `captions`.

    `flops` are those of the UNets a picture, `unet` and `whole` seconds a picture, `unet_ratio` and `whole_ratio` the
    medians over the turns of the ratios to the full run's in the same turn. `psnr` and `worst` are dB to the full run's
    pictures, `right` and the `differences` are of the score (docs/quality.md).
    """

    kind: str
    captions: int
    flops: float
    unet: float
    whole: float
    unet_ratio: float
    whole_ratio: float
    psnr: float
    worst: float
    right: float
    sharpness: float
    differences: dict[str, Difference]


class Report(msgspec.Struct, frozen=True):
    """Everything that one run measured; `full` names the row that the others are compared with."""

    machine: dict[str, str | int]
    versions: dict[str, str]
    captions: int
    full: str
    rows: dict[str, Row]
    bars: list[Bar]


def frontier(rows: Mapping[str, Row]) -> list[str]:
    """Return the settings that no other beats in both UNet time and PSNR, the fastest first."""
    best: list[str] = []
    for name, row in sorted(rows.items(), key=lambda item: (item[1].unet_ratio, -item[1].psnr)):
        if not best or row.psnr > rows[best[-1]].psnr:
            best.append(name)
    return best


def table(report: Report) -> str:
    """Return the report as Markdown."""
    return markdown_page(_TITLE, _sections(report), _about(report))


def page(report: Report) -> str:
    """Return the report as a page of HTML, with a chart of UNet time against PSNR."""
    with styled():
        return html_page(_TITLE, _about(report), _sections(report), {"settings": [_chart(report)]})


def _chart(report: Report) -> str:
    """Return a dot for each setting, those of a kind joined, and the frontier as a line behind them."""
    others = {name: row for name, row in report.rows.items() if name != report.full}
    kinds = coloured(row.kind for row in others.values())
    axes = axes_of(300, left=44, right=18, bottom=40, top=14)
    axes.set_xlabel("UNet time, of the full run's", loc="right")
    axes.yaxis.set_major_formatter("{x:g} dB")
    best = [others[name] for name in frontier(others)]
    axes.plot([row.unet_ratio for row in best], [row.psnr for row in best], color=_FRONTIER, lw=7, alpha=0.35)
    for kind, colour in kinds.items():
        own = sorted((row.unet_ratio, row.psnr, name) for name, row in others.items() if row.kind == kind)
        axes.plot([x for x, _, _ in own], [y for _, y, _ in own], color=colour, lw=1)
        for x, y, name in own:
            axes.plot([x, x], [y, y], color=colour, lw=9, gid=f"{SAID}{name}: {y:.1f} dB at {x:.2f} of the UNet time")
    return drawn("UNet time against the difference to the full run", {**kinds, "frontier": _FRONTIER}, axes)


def _about(report: Report) -> str:
    return (
        f"The embedded pair, up to {report.captions} captions from the same noise, against {report.full} of the fp16"
        " bundle."
        f" {machine_words(report.machine)}. Written by `{COMMAND}`."
    )


def _sections(report: Report) -> list[Section]:
    best = frontier({name: row for name, row in report.rows.items() if name != report.full})
    head = (
        "setting", "captions", "UNet TFLOP", "UNet time", "picture", "PSNR median / worst", "right %", "right, points",
        "sharpness", "damage",
    )  # fmt: skip
    rows = tuple(_cells(name, row, is_full=name == report.full) for name, row in report.rows.items())
    own = frozenset(number for number, name in enumerate(report.rows) if name in best)
    says = (
        "Each setting drew the first captions, and is compared with the full run on these. Times are medians over the"
        " turns of the ratio to the full run in the same turn, with seconds a picture in brackets; differences are"
        " means over the pictures, with 95 % intervals, starred where 0 lies outside. Marked rows are those that no"
        " other setting beats in both UNet time and PSNR."
    )
    found = [Section("settings", "Settings", (says,), (Table(head, rows, ours=own),))]
    if report.bars:
        bars = tuple((bar.what, bar.bar, bar.value, VERDICTS[bar.met]) for bar in report.bars)
        found.insert(
            0, Section("bars", "Bars", (), (Table(("", "bar", "measured", "met"), bars, words=4, verdict=True),))
        )
    return found


def _cells(name: str, row: Row, *, is_full: bool) -> tuple[str, ...]:
    times = (f"{row.unet_ratio:.3f} ({row.unet:.2f} s)", f"{row.whole_ratio:.3f} ({row.whole:.2f} s)")
    first = (name, f"{row.captions}", f"{row.flops / 1e12:.3f}", *times)
    if is_full:
        return (*first, "–", f"{row.right:.1f}", "–", f"{row.sharpness:.3f}", "–")
    said = [_said(row.differences["right"], 100.0, 2), _said(row.differences["sharpness"], 1.0, 4),
            _said(row.differences["damage"], 1.0, 4)]  # fmt: skip
    return (*first, f"{row.psnr:.1f} / {row.worst:.1f}", f"{row.right:.1f}", *said)


def _said(found: Difference, scale: float, digits: int) -> str:
    mean, low, high = (f"{scale * value:+.{digits}f}" for value in (found.mean, found.low, found.high))
    return f"{mean} ({low} to {high})" + ("" if found.includes_zero else " *")
