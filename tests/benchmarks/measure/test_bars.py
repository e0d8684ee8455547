"""Bars and result files: the checked-in results can be read, and reproduce the tables beside them."""

from pathlib import Path

import msgspec
import pytest

from sdxl_trt.benchmarks.full_size import build, export
from sdxl_trt.benchmarks.measure.bars import Bar, at_least, at_most, bars_table, missed
from sdxl_trt.benchmarks.measure.results import package_versions, results_parser, write_results


@pytest.mark.parametrize(
    ("value", "said", "met"), [(0.5, "0.5 s", True), (0.6, "0.6 s", False), (None, "not measured", None)]
)
def test_a_figure_is_compared_with_its_limit(value: float | None, said: str, met: bool | None) -> None:
    assert at_most("a", value, 0.5, "0.5 s", lambda seconds: f"{seconds} s") == Bar("a", "<= 0.5 s", said, met)


@pytest.mark.parametrize(
    ("value", "said", "met"), [(0.5, "50%", True), (0.4, "40%", False), (None, "not measured", None)]
)
def test_a_share_is_compared_with_the_least(value: float | None, said: str, met: bool | None) -> None:
    assert at_least("a", value, 0.5, "50%", lambda share: f"{share:.0%}") == Bar("a", ">= 50%", said, met)


def test_a_missed_bar_is_bold_and_one_that_was_not_measured_is_not_missed() -> None:
    bars = [Bar("a", "<= 1", "1", True), Bar("b", "<= 1", "not measured", None)]
    assert not missed(bars)
    assert missed([*bars, Bar("c", "<= 1", "2", False)])
    assert bars_table([Bar("c", "<= 1", "2", False)])[-1] == "| c | <= 1 | 2 | **no** |"


@pytest.mark.parametrize("module", [build, export], ids=["build", "export"])
def test_the_checked_in_results_reproduce_the_table_beside_them(module: "type[build]") -> None:
    report = msgspec.json.decode(module.RESULTS.read_bytes(), type=module.Report)
    assert module.table(report) == module.RESULTS.with_suffix(".md").read_text(encoding="utf-8")


def test_results_are_written_with_their_table(tmp_path: Path) -> None:
    write_results(Bar("a", "b", "c", None), "| a |\n", tmp_path / "new/x.json")
    assert msgspec.json.decode((tmp_path / "new/x.json").read_bytes(), type=Bar) == Bar("a", "b", "c", None)
    assert (tmp_path / "new/x.md").read_text() == "| a |\n"


def test_a_missing_package_is_not_installed() -> None:
    found = package_versions(["sdxl-trt", "no-such-distribution"])
    assert found["no-such-distribution"] == "not installed"
    assert found["sdxl-trt"][0].isdigit()


def test_the_options_of_every_measurement_are_parsed() -> None:
    parser = results_parser("x", None, work=Path("a"), results=Path("b"), case="plan")
    arguments = parser.parse_args(["--quick", "--only", "p", "--only", "q"])
    assert (arguments.work, arguments.results, arguments.quick, arguments.only) == (
        Path("a"),
        Path("b"),
        True,
        ["p", "q"],
    )
