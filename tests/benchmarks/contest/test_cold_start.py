"""Cold starts: the order of turns, failures, the comparison of the pictures, and the bars."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from sdxl_trt.benchmarks.contest.bars import bench_bars
from sdxl_trt.benchmarks.contest.bench import BenchOptions, settled_spec
from sdxl_trt.benchmarks.contest.cold_start import OURS, THEIRS, cold_starts, commands, likeness
from sdxl_trt.benchmarks.measure.processes import Measured
from sdxl_trt.benchmarks.measure.subjects import Subject, find_subject
from sdxl_trt.benchmarks.report.records import BenchReport, BenchSettings, Contestant, Measurement
from sdxl_trt.mini.embedded import bundle_path

SETTINGS = BenchSettings(bundle="", model="", width=8, height=8, batch=1, steps=1, handoff=None, guidance=1, seed=0,
                    tokens=77, runs=1, warmups=1, threads=1, prompt="")  # fmt: skip


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return find_subject(None, None, None, tmp_path_factory.mktemp("work"), lambda _: None)


class Runner:
    """Stands in for processes: ours takes 1 s, theirs 4 s and ten times the memory; both write a picture."""

    def __init__(self, shade: int = 0, fails: str = "") -> None:
        self.order: list[str] = []
        self._shade, self._fails = shade, fails

    def __call__(self, command: list[str]) -> Measured:
        ours = "sdxl_trt.runtime.cli" in command
        self.order.append("o" if ours else "t")
        if self._fails and (self._fails == OURS) == ours:
            return Measured(tuple(command), 1, 1.0, 1, 1, 1, "Traceback\nerror: no memory")
        picture = np.full((8, 8, 3), 100 + (0 if ours else self._shade), np.uint8)
        Image.fromarray(picture).save(command[-1])
        return Measured(tuple(command), 0, 1.0 if ours else 4.0, 10 if ours else 100, 1, 1, "")


def test_both_take_turns_and_the_first_round_is_not_counted(subject: Subject) -> None:
    runner = Runner()
    (ours, theirs), said = cold_starts(subject, settled_spec(subject, BenchOptions()), 3, run=runner)
    assert "".join(runner.order) == "to" + "ot" + "to" + "ot"
    assert (ours.name, ours.seconds, ours.peak_rss) == (OURS, (1.0,) * 3, 10)
    assert (theirs.name, theirs.seconds, theirs.peak_rss) == (THEIRS, (4.0,) * 3, 100)
    assert "the same picture" in said
    assert not any("/" in part for start in (ours, theirs) for part in start.command)
    found = bench_bars(_report(cold_starts=(ours, theirs)))
    assert [(bar.value, bar.met) for bar in found] == [
        ("0.25 times (1.00 of 4.00 s)", True), ("0.10 times (0 of 0 MB)", True)
    ]  # fmt: skip


def test_different_pictures_are_reported(subject: Subject) -> None:
    _, said = cold_starts(subject, settled_spec(subject, BenchOptions()), 1, run=Runner(shade=60))
    assert "DIFFERENT" in said


def test_a_failing_command_is_listed_and_not_run_again(subject: Subject) -> None:
    runner = Runner(fails=THEIRS)
    (ours, theirs), said = cold_starts(subject, settled_spec(subject, BenchOptions()), 2, run=runner)
    assert "".join(runner.order) == "tooo"
    assert (theirs.seconds, theirs.missing) == ((), "error: no memory")
    assert len(ours.seconds) == 2
    assert said == ""
    assert {bar.met for bar in bench_bars(_report(cold_starts=(ours, theirs)))} == {None}


def test_both_commands_have_the_same_settings(subject: Subject, tmp_path: Path) -> None:
    spec = settled_spec(subject, BenchOptions(steps=9, handoff=0.5, seed=3, guidance=2.0, width=64))
    found = commands(subject, spec, tmp_path)
    for option, value in (("--steps", "9"), ("--handoff", "0.5"), ("--seed", "3"), ("--guidance", "2.0"),
                          ("--width", "64"), ("--height", "128")):  # fmt: skip
        assert {line[line.index(option) + 1] for line in found.values()} == {value}
    without = find_subject(bundle_path(), None, None, tmp_path, lambda _: None)
    assert list(commands(without, spec, tmp_path)) == [OURS]


def test_pictures_of_different_sizes_are_not_compared(tmp_path: Path) -> None:
    for name, side in (("a", 8), ("b", 16)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{name}.png")
    assert "different sizes" in likeness(tmp_path / "a.png", tmp_path / "b.png")


def _report(**given: Any) -> BenchReport:
    return BenchReport(machine={}, versions={}, settings=SETTINGS, **given)


def _taken(contestant: str, what: str, *seconds: float) -> Measurement:
    return Measurement(contestant=contestant, what=what, width=8, height=8, batch=1, seconds=seconds)


def test_the_bars_use_ratios_of_paired_rounds() -> None:
    names = ("sdxl-trt", "eager", "compile", "optimum")
    contestants = tuple(Contestant(name=name, title=name, precision="fp32") for name in names)
    taken = (_taken("sdxl-trt", "base UNet step", 1, 2, 3), _taken("eager", "base UNet step", 2, 4, 6.1),
             _taken("sdxl-trt", "picture", 1, 1), _taken("optimum", "picture", 1, 1))  # fmt: skip
    eager, compiled, optimum = bench_bars(_report(contestants=contestants, measurements=taken))
    assert (eager.met, eager.bar) == (True, "<= 0.55 times, goal 0.5")
    assert eager.value == "0.50 times, 0.49 to 0.50 (2.00 s of 4.00 s)"
    assert (compiled.met, compiled.value) == (None, "not measured")
    assert optimum.met is False


def test_the_bars_of_eight_bits_are_of_their_own_contestant() -> None:
    names = ("sdxl-trt", "sdxl-trt-int8", "eager-bf16", "openvino-bf16")
    contestants = tuple(Contestant(name=name, title=name, precision="") for name in names)
    taken = (_taken("sdxl-trt", "picture", 4, 4), _taken("sdxl-trt-int8", "picture", 2, 2),
             _taken("eager-bf16", "picture", 3, 3))  # fmt: skip
    found = {bar.what: bar for bar in bench_bars(_report(contestants=contestants, measurements=taken))}
    assert found["picture of sdxl-trt-int8 over that of sdxl-trt"].met is True
    assert found["picture of sdxl-trt-int8 over that of eager-bf16"].met is False
    assert found["picture of sdxl-trt-int8 over that of openvino-bf16"].met is None
    assert found["base UNet step of sdxl-trt-int8 over that of sdxl-trt"].met is None
    assert len(found) == 4
    without = bench_bars(_report(contestants=contestants[:1] + contestants[2:], measurements=taken))
    assert without == ()


@pytest.mark.parametrize(("seconds", "met"), [(1.5, True), (1.6, False)])
def test_the_fastest_presets_bar_is_of_pictures_of_thirty_steps(seconds: float, *, met: bool) -> None:
    names = ("sdxl-trt", "sdxl-trt-fastest-openvino", "diffusers")
    contestants = tuple(Contestant(name=name, title=name, precision="") for name in names)
    taken = (_taken("sdxl-trt-fastest-openvino", "picture", seconds, seconds), _taken("diffusers", "picture", 10, 10))
    report = _report(contestants=contestants, measurements=taken)
    assert bench_bars(report) == ()  # of one step the bar says nothing
    whole = msgspec.structs.replace(report, settings=msgspec.structs.replace(SETTINGS, steps=30))
    (bar,) = bench_bars(whole)
    assert (bar.what, bar.met) == ("picture of sdxl-trt-fastest-openvino over that of diffusers", met)


@pytest.mark.parametrize(("stages", "met"), [((3.0, 2.0), True), ((3.0, 2.1), False), (None, None)])
def test_the_fast_presets_bar_is_of_both_unets_time(stages: tuple[float, float] | None, *, met: bool | None) -> None:
    """Encoding and decoding, which no cache makes faster, do not count."""
    contestants = tuple(Contestant(name=name, title=name, precision="") for name in ("sdxl-trt", "sdxl-trt-fast"))
    full = msgspec.structs.replace(_taken("sdxl-trt", "picture", 13), stages={"base": 7, "refiner": 3, "decode": 3})
    fast = _taken("sdxl-trt-fast", "picture", 8)
    if stages is not None:
        fast = msgspec.structs.replace(fast, stages={"base": stages[0], "refiner": stages[1], "decode": 3})
    report = _report(contestants=contestants, measurements=(full, fast))
    assert bench_bars(report) == ()  # of one step the bar says nothing
    (bar,) = bench_bars(msgspec.structs.replace(report, settings=msgspec.structs.replace(SETTINGS, steps=30)))
    assert (bar.what, bar.met) == ("UNet time of a picture, sdxl-trt-fast over that of sdxl-trt", met)
