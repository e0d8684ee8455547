"""A report as Markdown: it has every figure, in reading order, and all names are escaped."""

import math
import re
from xml.etree import ElementTree as ET

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from sdxl_trt.benchmarks.report.document import Table, without_empty
from sdxl_trt.benchmarks.report.markdown import code_block, escaped, markdown_report, table_lines
from sdxl_trt.benchmarks.report.pages import page
from sdxl_trt.benchmarks.report.quantities import memory, plain, significant, time_unit, times
from sdxl_trt.benchmarks.report.readme import block
from sdxl_trt.benchmarks.report.records import BenchReport, Contestant, Measurement
from sdxl_trt.benchmarks.report.sections import machine_words

GITHUB = MarkdownIt("gfm-like", {"linkify": False})
HOSTILE = st.text(st.sampled_from("ab1 .|*_`~[]()<>!#-+=&;:\\\"'$\n\t/@\0\u202e"), min_size=1, max_size=20)


def _rendered(text: str) -> ET.Element:
    return ET.fromstring(f"<all>{GITHUB.render(text)}</all>")


@settings(max_examples=60, deadline=None)
@given(HOSTILE)
def test_a_cell_is_plain_text_to_a_markdown_parser(text: str) -> None:
    cell = _rendered("\n".join(table_lines(Table(("a", "b"), ((text, "c"),))))).find(".//td")
    assert cell is not None
    assert len(cell) == 0
    assert (cell.text or "").split() == plain(text).split()


@settings(max_examples=60, deadline=None)
@given(HOSTILE)
def test_no_command_can_end_its_code_block(text: str) -> None:
    everything = _rendered(code_block(text))
    assert [each.tag for each in everything.iter()] == ["all", "pre", "code"]
    assert (everything[0][0].text or "").strip() == plain(text)


@pytest.mark.parametrize("note", ["# big", "- a", "1. a", "> a", "=== a", "+ a", "<b>a</b>", "[a](b)", "![a](b)", "``"])
def test_a_note_stays_a_list_item(note: str, empty: BenchReport) -> None:
    everything = _rendered(markdown_report(msgspec.structs.replace(empty, notes=(note,))))
    found = [item for item in everything.iter("li") if item.text and item.text.strip() == note]
    assert len(found) == 1
    assert len(found[0]) == 0


def test_every_figure_is_in_the_report(report: BenchReport) -> None:
    text = markdown_report(report)
    for one in report.measurements:
        unit = time_unit(
            each.median for each in report.measurements if (each.what, each.sweep) == (one.what, one.sweep)
        )
        row = f"{unit.show(one.median)} | ±1.0 % | {unit.show(one.p95)} | 3"
        assert row in text, one
    for ratio in report.ratios:
        assert f"{times(ratio.median)} ({significant(ratio.low)}–{significant(ratio.high)})" in text
    for start in report.cold_starts[:2]:
        assert f"{start.median:.2f} s" in text
        assert memory(start.peak_rss) in text
    for shown in ("211 ms", "3.11 s", "94.3 s", "612 MB", "1.72 GB", "1.23 GB", "81.3 dB", "0.9987", "0.913", "17.2 dB",
                  "1.70×", "0.237×", "0.251×", "1.5e-06", "0.250 J", "1.95", "16.0 GB"):  # fmt: skip
        assert shown in text, shown


def test_figures_are_labelled(report: BenchReport) -> None:
    text = markdown_report(report)
    assert "| | bar |" in re.sub(" +", " ", text)
    assert "**base UNet step: 64×64, batch 1, 2 rows**" in text
    assert "**picture, by size: batch 1**" in text
    assert "| PyTorch eager, fp32 | base alone |" in text
    assert "| a picture | <= 0.4 times | 0.50 times | **no** |" in text
    assert "1 of 3 bars met, 1 missed, 1 not measured." in text
    assert "trt-bench --engines 'a folder'" in text


def test_the_bars_come_first_and_the_commands_last(report: BenchReport) -> None:
    heads = re.findall(r"^## (.*)$", markdown_report(report), re.MULTILINE)
    assert heads == ["Bars", "End to end", "Part by part", "Before the first run", "Cold start", "Quality",
                     "What could not run", "Notes", "How it was measured"]  # fmt: skip


def test_contestants_that_could_not_run_are_named_with_the_reason(report: BenchReport) -> None:
    text = markdown_report(report)
    assert "| OpenVINO | everything | there is no environment of peers |" in text
    assert "| PyTorch eager, fp32 | VAE decode | it has none |" in text
    assert "| another | cold start | it failed |" in text


def test_the_rates_of_the_machine_and_notes_on_contestants_are_said(report: BenchReport) -> None:
    machine = report.machine | {"fp32_GEMM": "51 and 98 GFLOP/s on 1 and 2 threads", "load": "0.01"}
    ours, *others = report.contestants
    noted = msgspec.structs.replace(ours, note="a part is not in 8 bits")
    told = msgspec.structs.replace(report, machine=machine, contestants=(noted, *others))
    words = "a processor, 2 cores, fp32 GEMM 51 and 98 GFLOP/s on 1 and 2 threads"
    assert machine_words(machine) == words
    assert "fp32 GEMM 51 and 98 GFLOP/s on 1 and 2 threads, load 0.01." in markdown_report(told)
    assert "- sdxl-trt, fp32: a part is not in 8 bits" in markdown_report(told)
    assert words in page(told)
    assert words in block({"bench": told})


def test_nonfinite_arrays_are_not_called_equal(report: BenchReport) -> None:
    text = markdown_report(report)
    assert "| fp32 | embeddings | equal |" in text
    assert "| broken | pixels | not finite |" in text


def test_an_empty_report_has_only_the_setup(empty: BenchReport) -> None:
    assert re.findall(r"^## (.*)$", markdown_report(empty), re.MULTILINE) == ["How it was measured"]


def test_one_contestant_has_no_ratio(report: BenchReport) -> None:
    alone = msgspec.structs.replace(
        report, contestants=report.contestants[:1], ratios=(),
        measurements=tuple(one for one in report.measurements if one.contestant == "sdxl-trt"),
    )  # fmt: skip
    assert "/ this" not in markdown_report(msgspec.structs.replace(alone, cold_starts=()))


def test_equal_labels_are_told_apart_by_name(report: BenchReport) -> None:
    twins = tuple(Contestant(name=name, title="X", precision="fp32") for name in ("sdxl-trt", "eager"))
    text = markdown_report(msgspec.structs.replace(report, contestants=twins))
    assert "| **X, fp32 (sdxl-trt)** |" in text
    assert "| X, fp32 (eager) |" in text


def test_a_measurement_without_runs_or_contestant_is_no_error(report: BenchReport) -> None:
    def one(contestant: str, seconds: tuple[float, ...]) -> Measurement:
        return Measurement(contestant=contestant, what="odd", width=8, height=8, batch=1, seconds=seconds)

    text = markdown_report(msgspec.structs.replace(report, measurements=(one("eager", ()), one("nobody", (0.0,)))))
    assert "| nobody | 0 µs |" in text


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.0, "0 µs"), (8.25e-5, "82.5 µs"), (0.0123456, "12.3 ms"), (0.9996, "1000 ms"), (59.96, "60.0 s"),
     (123456.7, "123457 s"), (1e300, "1.00e+300 s"), (1e-300, "1.00e-294 µs")],
)  # fmt: skip
def test_seconds_have_three_digits_and_a_unit(seconds: float, said: str) -> None:
    assert time_unit([seconds]).show(seconds) == said


@given(st.floats(-1e308, 1e308) | st.sampled_from([math.inf, -math.inf, math.nan]))
def test_any_number_can_be_formatted(value: float) -> None:
    said = significant(value)
    if abs(value) in {0, float("inf")} or math.isnan(value):
        return
    assert float(said) == pytest.approx(value, rel=0.006)


def test_empty_columns_are_left_out() -> None:
    head, rows = without_empty(["", "a", "b"], [("x", "", "1"), ("y", "", "")])
    assert (head, rows) == (("", "b"), (("x", "1"), ("y", "–")))


def test_escaping_leaves_plain_text_unchanged() -> None:
    assert escaped("<= 0.5 times, 2 < 3, a–b") == "<= 0.5 times, 2 < 3, a–b"
