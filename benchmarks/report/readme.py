"""Generate the README's benchmark from the checked-in results: ``make readme``.

Writes Markdown and HTML beside every ``benchmarks/results/bench*.json``, and a table of each between two markers in
the README. A test compares all of them with this module's output, so no figure in them is typed by hand.
"""

__all__ = ["BEGIN", "END", "block", "main", "read_results", "rewritten"]

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from sdxl_trt.benchmarks.measure import RESULTS_FOLDER, write_text
from sdxl_trt.benchmarks.report.document import Table, without_empty
from sdxl_trt.benchmarks.report.markdown import escaped, table_lines
from sdxl_trt.benchmarks.report.pages import write_views
from sdxl_trt.benchmarks.report.quantities import memory, significant, time_unit, times
from sdxl_trt.benchmarks.report.records import BenchReport, read_report
from sdxl_trt.benchmarks.report.sections import bars_words, machine_words, settings_words
from sdxl_trt.benchmarks.report.timed import PICTURE, labels, our_names
from sdxl_trt.engines import CorruptError
from sdxl_trt.engines.host import Parser, run

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
RESULTS = RESULTS_FOLDER
README = Path(__file__).parents[2] / "README.md"
STEP = "base UNet step"
NOTHING = "*Not measured yet.* `make bench` measures, and `make readme` puts the figures here."


def read_results() -> dict[str, BenchReport]:
    """Return trt-bench's reports in RESULTS, by file stem. Raises CorruptError for a file that is not one."""
    return {path.stem: read_report(path) for path in sorted(RESULTS.glob("bench*.json"))}


def block(reports: Mapping[str, BenchReport]) -> str:
    """Return the text between the README's markers: a table of each report, or NOTHING without reports."""
    return "\n\n".join(_summary(name, report) for name, report in reports.items()) or NOTHING


def rewritten(readme: str, text: str) -> str:
    """Return `readme` with `text` between its markers. Raises CorruptError unless there is exactly one pair."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in before + after:
        raise CorruptError(f"README.md: expected one {BEGIN} followed by one {END}; put them back")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def _summary(name: str, report: BenchReport) -> str:
    machine = machine_words(report.machine)
    lines = [f"**{escaped(settings_words(report.settings))}**, on {escaped(machine)}:", ""]
    lines += table_lines(_table(report))
    named = labels(report)
    missing = [f"{named[one.name]} ({one.missing})" for one in report.contestants if one.missing]
    if missing:
        lines += ["", f"Could not run: {escaped('; '.join(missing))}."]
    met = f" {bars_words(report)}." if report.bars else ""
    lines += ["", f"[Full report](benchmarks/results/{name}.md), with spreads, versions and the command.{met}"]
    return "\n".join(lines)


def _table(report: BenchReport) -> Table:
    named, ours = labels(report), our_names(report)
    there = [one for one in report.contestants if not one.missing]
    rows = []
    for one in there:
        picture = report.of(one.name, PICTURE)
        rate = (picture.pictures or picture.batch) / picture.median if picture and picture.median else None
        rows.append([
            named[one.name], _time(report, one.name, STEP), _ratio(report, one.name, STEP),
            _time(report, one.name, PICTURE), _ratio(report, one.name, PICTURE),
            "" if rate is None else significant(rate), "" if one.peak_rss is None else memory(one.peak_rss),
        ])  # fmt: skip
    over = f"{ours[0]} / this" if ours else ""
    head, filled = without_empty(["", STEP, over, "a picture", over, "pictures/s", "peak RSS"], rows)
    return Table(head, filled, ours=frozenset(number for number, one in enumerate(there) if one.name in ours))


def _time(report: BenchReport, contestant: str, what: str) -> str:
    unit = time_unit(one.median for one in report.measurements if one.what == what and one.seconds and not one.sweep)
    found = report.of(contestant, what)
    return unit.show(found.median) if found and found.seconds else ""


def _ratio(report: BenchReport, contestant: str, what: str) -> str:
    ours = our_names(report)[:1]
    found = (one for one in report.ratios if [one.contestant] == ours and (one.against, one.what) == (contestant, what))
    ratio = next(found, None)
    return times(ratio.median) if ratio else ""


def main(argv: list[str] | None = None) -> int:
    """Rewrite the results' pages and the README's block; return the exit code."""
    parser = Parser(prog="python -m sdxl_trt.benchmarks.report.readme", description=__doc__)
    parser.add_argument("--debug", action="store_true", help="add the traceback to an error")
    return run(parser, _rewrite, argv)


def _rewrite(_: argparse.Namespace) -> None:
    reports = read_results()
    for name, report in reports.items():
        write_views(report, RESULTS, name)
    write_text(rewritten(README.read_text(encoding="utf-8"), block(reports)), README)


if __name__ == "__main__":
    sys.exit(main())
