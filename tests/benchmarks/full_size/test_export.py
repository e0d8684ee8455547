"""The benchmark's arithmetic, and one run with models so small that its figures mean nothing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sdxl_trt.benchmarks.full_size import export
from sdxl_trt.benchmarks.full_size.export import ExportCase, bars, cases, main, run, table
from sdxl_trt.benchmarks.measure.processes import Measured

GB = 10**9


def _measured(seconds: float = 1, peak: float = 0.5, code: int = 0) -> Measured:
    return Measured(("python", "-c", ""), code, seconds, int(peak * GB), 0, 0, "planted")


def _all_good() -> dict[str, Measured]:
    return {
        "imports of ours": _measured(peak=0.4), "base UNet": _measured(90, 1.1), "narrow UNet": _measured(80, 1.0),
        "pair": _measured(590, 1.9), "TensorRT parser": _measured(), "imports of torch": _measured(peak=0.5),
        "1B UNet": _measured(50, 1.4), "1B UNet by torch": _measured(51, 4.6),
        "imports of optimum": _measured(peak=0.6), "1B base": _measured(60, 1.4),
        "1B base by optimum": _measured(61, 4.7),
    }  # fmt: skip


def test_figures_within_their_bars_are_met() -> None:
    assert [bar.met for bar in bars(_all_good())] == [True] * 10


@pytest.mark.parametrize(
    ("name", "worse", "missed"),
    [
        ("base UNet", _measured(101, 1.1), [1]),
        ("base UNet", _measured(90, 1.21), [0]),
        ("base UNet", _measured(90, 1.19), []),
        ("narrow UNet", _measured(80, 0.8), [4]),
        ("pair", _measured(601, 2.1), [2, 3]),
        ("1B UNet", _measured(52, 1.5), [5, 6]),
        ("1B base", _measured(62, 1.5), [7, 8]),
        ("imports of ours", _measured(peak=0.3), [5, 7]),
        ("TensorRT parser", _measured(code=1), [9]),
    ],
)
def test_a_figure_over_its_bar_is_missed(name: str, worse: Measured, missed: list[int]) -> None:
    found = bars(_all_good() | {name: worse})
    assert [i for i, bar in enumerate(found) if bar.met is False] == missed


def test_cases_that_failed_or_did_not_run_are_not_measured() -> None:
    runs = _all_good()
    del runs["1B base by optimum"]
    found = bars(runs | {"base UNet": _measured(1, 0.1, code=5)})
    assert [i for i, bar in enumerate(found) if bar.met is None] == [0, 1, 4, 7, 8]
    assert {bar.value for bar in found if bar.met is None} == {"not measured"}


def test_missing_peers_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "PEERS", tmp_path / "peers/bin/python")
    missing = {case.name: case.missing for case in cases(tmp_path, quick=True) if case.missing}
    assert missing.keys() == {"imports of optimum", "1B base by optimum"}
    chosen = [case for case in cases(tmp_path, quick=True) if case.missing]
    report = run(chosen, tmp_path, quick=True)
    assert report.runs == {}
    assert "| imports of optimum | not run | | | | there is no " in table(report)


def test_a_cases_output_is_deleted(tmp_path: Path) -> None:
    import sys

    out = tmp_path / "exported/a"
    code = f"import pathlib; pathlib.Path({str(out)!r}).mkdir(parents=True)"
    report = run([ExportCase("a", (sys.executable, "-c", code), out)], tmp_path, quick=True)
    assert report.runs["a"].ok
    assert not out.exists()


def test_the_bars_use_the_cases_names(tmp_path: Path) -> None:
    assert {case.name for case in cases(tmp_path, quick=False)} == _all_good().keys()


def _with_an_encoder(work: Path, *, quick: bool) -> list[ExportCase]:
    small = {"unet": "text_encoder"}
    return [replace(case, command=tuple(small.get(word, word) for word in case.command))
            for case in cases(work, quick=quick)]  # fmt: skip


@pytest.mark.slow
def test_a_quick_run_measures_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text encoder replaces the UNet, whose trace takes longer than everything else here."""
    monkeypatch.setattr(export, "cases", _with_an_encoder)
    results = tmp_path / "results.json"
    only = ["--only", "imports of ours", "--only", "base UNet"]
    code = main(["--quick", "--work", str(tmp_path / "work"), "--results", str(results), *only])
    assert code == 0, capsys.readouterr().err
    report: dict[str, Any] = msgspec.json.decode(results.read_bytes())
    assert report["runs"].keys() == {"imports of ours", "base UNet"}
    assert report["runs"]["base UNet"]["output"].endswith("checked 1 graphs")
    assert report["runs"]["base UNet"]["peak_anonymous"] > 50_000_000
    assert report["versions"]["torch"] != "not installed"
    assert results.with_suffix(".md").read_text() == capsys.readouterr().out
