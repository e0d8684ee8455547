"""The README's benchmark and the results' pages are generated from the checked-in results."""

from xml.etree import ElementTree as ET

import msgspec
import pytest

from sdxl_trt.benchmarks.report.markdown import markdown_report
from sdxl_trt.benchmarks.report.pages import page
from sdxl_trt.benchmarks.report.readme import BEGIN, END, NOTHING, README, RESULTS, block, read_results, rewritten
from sdxl_trt.benchmarks.report.records import BenchReport
from sdxl_trt.engines.errors import CorruptError


def test_the_readme_matches_the_results() -> None:
    readme = README.read_text(encoding="utf-8")
    assert rewritten(readme, block(read_results())) == readme, "run: make readme"


def _facts(html: str) -> str:
    """Return a page with the texts of its charts alone: another matplotlib may draw their shapes otherwise."""
    tree = ET.fromstring(html.removeprefix("<!DOCTYPE html>"))
    for svg in tree.iter("svg"):
        svg.text = "\n".join(sorted(svg.itertext()))
        svg[:] = []
    return ET.tostring(tree, encoding="unicode")


def test_the_pages_match_the_results() -> None:
    for name, report in read_results().items():
        assert (RESULTS / f"{name}.md").read_text(encoding="utf-8") == markdown_report(report), "run: make readme"
        checked_in = _facts((RESULTS / f"{name}.html").read_text(encoding="utf-8"))
        assert checked_in.count("<svg") >= (10 if report.quality else 1)
        assert checked_in == _facts(page(report)), "run: make readme"


def test_a_figure_of_a_chart_that_changes_changes_the_facts(report: BenchReport) -> None:
    first, *others = report.quality
    worse = msgspec.structs.replace(report, quality=(first, msgspec.structs.replace(others[0], psnr=80.3), *others[1:]))
    one, other = (_facts(page(each)).partition("<figcaption><strong>precision") for each in (report, worse))
    assert one[2].partition("</figure>")[0] != other[2].partition("</figure>")[0]


def test_without_results_it_says_so() -> None:
    assert block({}) == NOTHING
    assert "Not measured yet" in NOTHING


def test_figures_ratios_and_missing_contestants_are_in_the_block(report: BenchReport) -> None:
    text = block({"bench": report, "bench-other": report})
    assert text.count("| **sdxl-trt, fp32** | 51.3 ms | – | 0.513 s | – | 1.95 | 612 MB |") == 2
    assert "| PyTorch eager, fp32 | 103 ms | 0.500× | 1.03 s | 0.500× | 0.974 | 1.72 GB |" in text
    assert "Could not run: OpenVINO (there is no environment of peers)." in text
    assert "1 of 3 bars met, 1 missed, 1 not measured." in text
    assert "(benchmarks/results/bench-other.md)" in text


def test_a_changed_figure_changes_the_block(report: BenchReport) -> None:
    first, *others = report.measurements
    slower = msgspec.structs.replace(first, seconds=(0.7, 0.7, 0.7))
    assert block({"bench": msgspec.structs.replace(report, measurements=(slower, *others))}) != block({"bench": report})


def test_only_the_text_between_the_markers_is_rewritten() -> None:
    assert rewritten(f"a\n{BEGIN}\nold\n{END}\nb", "new") == f"a\n{BEGIN}\nnew\n{END}\nb"


@pytest.mark.parametrize("readme", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{BEGIN}{END}", f"{BEGIN}{END}{END}"])
def test_a_readme_without_its_markers_is_refused(readme: str) -> None:
    with pytest.raises(CorruptError, match="put them back"):
        rewritten(readme, "new")
