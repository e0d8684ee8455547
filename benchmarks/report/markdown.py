"""A trt-bench report as Markdown; all names and texts in it are escaped."""

__all__ = ["code_block", "escaped", "markdown_page", "markdown_report", "table_lines"]

import re
from collections.abc import Iterable, Iterator

from sdxl_trt.benchmarks.report.document import Section, Table
from sdxl_trt.benchmarks.report.quantities import plain
from sdxl_trt.benchmarks.report.records import BenchReport
from sdxl_trt.benchmarks.report.sections import sections

_SPECIAL = re.compile(r"([\\`*_\[\]|~$]|<(?=[A-Za-z/!?]))")
# Characters that start a heading, a list, a rule or a quotation at the beginning of a line.
_OPENING = re.compile(r"^(?=[#\-+=>])|^(\d+)(?=[.)])")


def markdown_report(report: BenchReport) -> str:
    """Return `report` as Markdown: bars first, then measurements, then how they were made."""
    return markdown_page("trt-bench", sections(report))


def markdown_page(title: str, found: Iterable[Section], about: str = "") -> str:
    """Return sections as Markdown under a title and a sentence `about` all of them."""
    blocks = [f"# {escaped(title)}", *([_line(about)] if about else [])]
    for section in found:
        blocks += _section(section)
    return "\n\n".join(blocks) + "\n"


def _section(section: Section) -> Iterator[str]:
    yield f"## {escaped(section.title)}"
    yield from (_line(sentence) for sentence in section.says)
    for table in section.tables:
        if table.caption:
            yield f"**{escaped(table.caption)}**"
        yield "\n".join(table_lines(table))
    if section.points:
        yield "\n".join(f"- {_line(point)}" for point in section.points)
    for about, command in section.commands:
        yield f"{_line(about)}:"
        yield code_block(command)


def table_lines(table: Table) -> list[str]:
    """Return the lines of a table; this project's rows and the verdict "no" are bold."""
    rule = ["---"] * table.words + ["---:"] * (len(table.head) - table.words)
    lines = [[escaped(cell) for cell in table.head], rule]
    for number, row in enumerate(table.rows):
        cells = [escaped(cell) for cell in row]
        if number in table.ours:
            cells[0] = f"**{cells[0]}**"
        if table.verdict and cells[-1] == "no":
            cells[-1] = "**no**"
        lines.append(cells)
    return [f"| {' | '.join(line)} |" for line in lines]


def escaped(text: str) -> str:
    """Return `text` escaped, so that Markdown shows it literally inside a line."""
    return _SPECIAL.sub(r"\\\1", plain(text)).replace("&", "&amp;")


def _line(text: str) -> str:
    return _OPENING.sub(r"\1\\", escaped(text))


def code_block(text: str) -> str:
    """Return `text` as a fenced code block; the fence is longer than any backtick run in it."""
    line = plain(text)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return f"{fence}\n{line}\n{fence}"
