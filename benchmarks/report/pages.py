"""A report of trt-bench as one HTML page that needs nothing else, and the files of a report."""

__all__ = ["element", "html_page", "page", "write_pages", "write_views"]

import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from sdxl_trt.benchmarks.measure import write_text
from sdxl_trt.benchmarks.report.charts import charts
from sdxl_trt.benchmarks.report.document import Section, Table
from sdxl_trt.benchmarks.report.markdown import markdown_report
from sdxl_trt.benchmarks.report.quantities import plain
from sdxl_trt.benchmarks.report.records import BenchReport, write_report
from sdxl_trt.benchmarks.report.sections import machine_words, sections
from sdxl_trt.benchmarks.report.style import STYLE

# No script runs in the page and nothing is fetched for it, whatever a name in it should hold.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_pages(report: BenchReport, folder: Path, name: str = "report") -> None:
    """Write `report` to `folder` as JSON, Markdown and HTML; each file appears when it is whole."""
    write_report(report, folder / f"{name}.json")
    write_views(report, folder, name)


def write_views(report: BenchReport, folder: Path, name: str = "report") -> None:
    """Write what is made of a report that is there: Markdown and HTML."""
    write_text(markdown_report(report), folder / f"{name}.md")
    write_text(page(report), folder / f"{name}.html")


def page(report: BenchReport) -> str:
    """Return `report` as a page of HTML that is well-formed XML, with its style and its charts in it."""
    settings = report.settings
    title = f"trt-bench: {settings.model}, {settings.width}×{settings.height}"
    machine = machine_words(report.machine)
    about = f"{machine}. Every figure is of one run, on one machine, with the command below."
    return html_page(title, about, sections(report), charts(report))


def html_page(title: str, about: str, found: Sequence[Section], drawn: Mapping[str, Sequence[str]]) -> str:
    """Return a page with a sentence `about` all of it, then its sections; `drawn` has their charts by key."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", markup(title)),
        element("style", STYLE),
    )
    links = [element("a", markup(section.title), href=f"#{section.key}") for section in found]
    header = element(
        "header",
        element("h1", markup(title)),
        element("p", markup(about)),
        element("nav", *links),
    )
    main = element("main", *(_section(section, drawn.get(section.key, ())) for section in found))
    body = element("body", header, main)
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _section(section: Section, drawn: Sequence[str]) -> str:
    parts = [element("h2", markup(section.title))]
    parts += [element("p", markup(sentence), class_="says") for sentence in section.says]
    if drawn:
        parts.append(element("div", *drawn, class_="charts"))
    parts += [element("div", _table(table), class_="scroll") for table in section.tables]
    if section.points:
        parts.append(element("ul", *(element("li", markup(point)) for point in section.points)))
    for about, command in section.commands:
        parts.append(element("p", markup(about), class_="command"))
        parts.append(element("pre", markup(command)))
    return "\n" + element("section", *parts, id=section.key)


def _table(table: Table) -> str:
    caption = [element("caption", markup(table.caption))] if table.caption else []
    heads = [
        element("th", markup(name) or " ", scope="col", class_="n" if column >= table.words else "w")
        for column, name in enumerate(table.head)
    ]
    rows = [
        element("tr", *_cells(table, row), class_="own" if number in table.ours else "row")
        for number, row in enumerate(table.rows)
    ]
    return element("table", *caption, element("thead", element("tr", *heads)), element("tbody", *rows))


def _cells(table: Table, row: Sequence[str]) -> Iterator[str]:
    yield element("th", markup(row[0]) or " ", scope="row")
    for column, text in enumerate(row[1:], 1):
        verdict = table.verdict and column == len(row) - 1 and text in {"yes", "no"}
        kind = text if verdict else "n" if column >= table.words else "w"
        yield element("td", markup(text) or " ", class_=kind)


def element(tag: str, /, *content: str, **attributes: str) -> str:
    """Return an element around `content`, which is markup; ``class_``, ``http_equiv`` become class, http-equiv."""
    given = "".join(f' {key.rstrip("_").replace("_", "-")}="{markup(value)}"' for key, value in attributes.items())
    return f"<{tag}{given}>{''.join(content)}</{tag}>" if content else f"<{tag}{given}/>"


def markup(text: str) -> str:
    """Return any text as markup that shows it."""
    return html.escape(plain(text))
