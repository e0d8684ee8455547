"""make bench: what it writes, when it fails, and its warnings about a rerun that disagrees."""

from pathlib import Path

import msgspec
import pytest

from sdxl_trt.benchmarks import ten_minutes
from sdxl_trt.benchmarks.contest.roster import ROSTER, choose
from sdxl_trt.benchmarks.measure.bars import Bar
from sdxl_trt.benchmarks.report.records import BenchReport, BenchSettings, Ratio, read_report
from sdxl_trt.benchmarks.ten_minutes import main
from sdxl_trt.engines.errors import SourceError

SETTINGS = BenchSettings(bundle="b", model="m", width=8, height=8, batch=1, steps=1, handoff=None, guidance=1, seed=0,
                    tokens=77, runs=1, warmups=1, threads=1, prompt="")  # fmt: skip


def _report(median: float, *, met: bool = True, cores: int = 2) -> BenchReport:
    ratio = Ratio(what="picture", contestant="a", against="b", rounds=3, low=0.9 * median, median=median,
                  high=1.1 * median)  # fmt: skip
    return BenchReport(machine={"processor": "p", "cores": cores}, versions={}, settings=SETTINGS, ratios=(ratio,),
                       bars=(Bar("a over b", "<= 1 times", f"{median:.2f} times", met),))  # fmt: skip


def _measure(monkeypatch: pytest.MonkeyPatch, folder: Path, report: BenchReport, *more: str) -> int:
    monkeypatch.setattr(ten_minutes, "_run", lambda *_, **__: report)
    return main(["--results", str(folder / "bench.json"), *more])


def test_results_are_written_and_a_rerun_that_agrees_prints_no_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _measure(monkeypatch, tmp_path, _report(0.5)) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "bench.md", "bench.html"}
    again = _report(0.52)
    assert _measure(monkeypatch, tmp_path, again) == 0
    assert read_report(tmp_path / "bench.json") == again
    printed = capsys.readouterr()
    assert "| a over b | <= 1 times | 0.52 times | yes |" in printed.out
    assert printed.err == ""


def test_a_rerun_that_disagrees_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _measure(monkeypatch, tmp_path, _report(0.5))
    _measure(monkeypatch, tmp_path, _report(0.8))
    assert "picture, a over b: 0.500 and 0.800" in capsys.readouterr().err
    # A run on another machine or with other settings is not compared.
    _measure(monkeypatch, tmp_path, _report(0.4, cores=64))
    _measure(monkeypatch, tmp_path, msgspec.structs.replace(_report(0.1), settings=SETTINGS))
    _measure(
        monkeypatch,
        tmp_path,
        msgspec.structs.replace(_report(0.9), settings=msgspec.structs.replace(SETTINGS, steps=2)),
    )
    assert capsys.readouterr().err == ""


def test_a_missed_bar_fails_but_not_on_the_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _measure(monkeypatch, tmp_path, _report(2, met=False)) == 1
    assert _measure(monkeypatch, tmp_path, _report(2, met=False), "--quick") == 0


def test_an_error_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> BenchReport:
        raise SourceError("no such folder")

    monkeypatch.setattr(ten_minutes, "_run", broken)
    assert main(["--results", str(tmp_path / "bench.json")]) == 2
    assert capsys.readouterr().err == "error: no such folder\n"
    assert list(tmp_path.iterdir()) == []


def test_presets_are_left_to_whole_pictures() -> None:
    """Of four steps a preset leaves two."""
    name, options = ten_minutes.COUSIN
    assert name == "cousin-50m"
    names = {entry.name for entry in choose(options.against)}
    assert {one for one in ROSTER if one not in names} == {
        "sdxl-trt-fast", "sdxl-trt-fastest", "sdxl-trt-fastest-openvino"
    }  # fmt: skip
