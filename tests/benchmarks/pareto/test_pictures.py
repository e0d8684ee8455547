"""Whole pictures beside other libraries: who draws, what is written, and when the command fails."""

from pathlib import Path
from typing import Any

import pytest

from sdxl_trt.benchmarks.contest.bench import BenchOptions
from sdxl_trt.benchmarks.contest.roster import FAST, FASTEST, ROSTER, choose
from sdxl_trt.benchmarks.measure.bars import Bar
from sdxl_trt.benchmarks.measure.subjects import Subject
from sdxl_trt.benchmarks.pareto import __main__ as command
from sdxl_trt.benchmarks.pareto import pictures
from sdxl_trt.benchmarks.pareto.__main__ import main
from sdxl_trt.benchmarks.pareto.pictures import AGAINST, draw_pictures
from sdxl_trt.benchmarks.report.records import (
    BenchReport,
    BenchSettings,
    Contestant,
    Measurement,
    Ratio,
    read_report,
)  # fmt: skip
from sdxl_trt.engines import EngineError


def _measured(options: BenchOptions) -> BenchReport:
    settings = BenchSettings(bundle="b", model="m", width=8, height=8, batch=1, steps=options.steps, handoff=0.8,
                             guidance=5, seed=0, tokens=77, runs=2, warmups=1, threads=2, prompt="p")  # fmt: skip
    seconds = {FASTEST: (1.0, 1.2), "diffusers": (10.0, 10.0)}
    taken = tuple(
        Measurement(contestant=name, what="picture", width=8, height=8, batch=1, seconds=seconds.get(name, (4.0, 4.0)),
                    stages={"base": 0.25, "refiner": 0.25} if name == FAST else {"base": 0.8, "refiner": 0.1},
                    pictures=1)
        for name in ("sdxl-trt", *AGAINST)
    )  # fmt: skip
    named = tuple(
        Contestant(name=one, title=ROSTER[one].title, precision="fp32", peak_rss=1) for one in ("sdxl-trt", *AGAINST)
    )
    ratio = Ratio(what="picture", contestant=FASTEST, against="diffusers", rounds=2, low=0.1, median=0.11, high=0.12)
    return BenchReport(machine={"processor": "p", "cores": 2}, versions={}, settings=settings, contestants=named,
                       measurements=taken, ratios=(ratio,), notes=("it was busy",))  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, BenchOptions]]:
    """Replace writing checkpoints, exporting and measuring; return the models and options that were measured."""
    found: list[tuple[str, BenchOptions]] = []
    subject = Subject(bundle=None, base="", refiner="", cache=tmp_path, name="", model="")  # type: ignore[arg-type]

    def run(given: Subject, options: BenchOptions, _: Any) -> BenchReport:
        found.append((given.model, options))
        return _measured(options)

    monkeypatch.setattr(pictures, "checkpoint_pair", lambda folder, size, _: [folder / "base", folder / "refiner"])
    monkeypatch.setattr(pictures, "find_subject", lambda *_: subject)
    monkeypatch.setattr(pictures, "run_bench", run)
    return found


def test_presets_and_other_libraries_draw_thirty_steps_in_turns(
    asked: list[tuple[str, BenchOptions]], tmp_path: Path
) -> None:
    report = draw_pictures(tmp_path, tmp_path / "results", ("make", "x"), lambda _: None, quick=False)
    ((model, options),) = asked
    assert (model, options.steps, options.width, options.height, options.runs) == ("cousin-50m", 30, 512, 512, 3)
    names = [entry.name for entry in choose(options.against)]
    assert names == ["sdxl-trt", *AGAINST]
    assert {"sdxl-trt-fast", FASTEST, "diffusers", "optimum", "openvino-bf16", "compile-bf16"} <= set(names)
    assert not options.components
    assert read_report(tmp_path / "results" / "bench_pictures.json") == report
    assert {path.suffix for path in (tmp_path / "results").iterdir()} == {".json", ".md", ".html"}
    assert (report.command, report.notes[-1]) == (("make", "x"), "it was busy")
    assert {bar.what: bar.met for bar in report.bars} == {
        "picture over that of optimum": False, f"picture of {FASTEST} over that of diffusers": True,
        "UNet time of a picture, sdxl-trt-fast over that of sdxl-trt": False,
    }  # fmt: skip


def test_a_quick_run_takes_the_tiny_model(asked: list[tuple[str, BenchOptions]], tmp_path: Path) -> None:
    draw_pictures(tmp_path, tmp_path, (), lambda _: None, quick=True)
    ((model, options),) = asked
    assert (model, options.width, options.runs) == ("tiny", 128, 1)
    assert options.steps < 30


@pytest.mark.parametrize(("quick", "code"), [(False, 1), (True, 0)])
@pytest.mark.usefixtures("asked")
def test_a_missed_bar_fails_but_not_on_the_tiny_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], *, quick: bool, code: int
) -> None:
    options = ["--pictures", "--results", str(tmp_path / "pareto.json"), "--work", str(tmp_path)]
    assert main([*options, *(["--quick"] if quick else [])]) == code
    assert "| picture over that of optimum | <= 0.9 times | 1.00 times" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {f"bench_pictures.{kind}" for kind in ("json", "md", "html")}


def test_settings_and_pictures_are_chosen_by_the_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def part(name: str) -> Any:
        return lambda _: ran.append(name) or [Bar(name, "", "", name == "_settings")]

    for name in ("_settings", "_pictures"):
        monkeypatch.setattr(command, name, part(name))
    results = ["--results", str(tmp_path / "pareto.json")]
    assert main(results) == 1
    assert main([*results, "--only", "10 steps"]) == 0
    assert main([*results, "--pictures"]) == 1
    assert ran == ["_settings", "_pictures", "_settings", "_pictures"]
    assert main([*results, "--pictures", "--only", "10 steps"]) == 2
    assert capsys.readouterr().err.startswith("error: --pictures and --only: ")
    assert len(ran) == 4


def test_ours_that_does_not_run_is_an_error_and_nothing_is_written(
    asked: list[tuple[str, BenchOptions]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def broken(*_: object) -> BenchReport:
        raise EngineError("sdxl-trt itself does not run: no memory")

    monkeypatch.setattr(pictures, "run_bench", broken)
    assert main(["--pictures", "--results", str(tmp_path / "pareto.json")]) != 0
    assert capsys.readouterr().err == "error: sdxl-trt itself does not run: no memory\n"
    assert list(tmp_path.iterdir()) == asked == []
