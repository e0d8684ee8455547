"""The progress line: what a terminal shows, and that nothing else sees it."""

import functools
import io
import logging
import sys
from typing import Any

import pytest
import tqdm

from sdxl_trt.engines.host.console import Parser, run
from sdxl_trt.engines.host.progress import ProgressLine


def test_a_stage_has_a_name_a_counter_and_times(terminal: Any) -> None:
    with ProgressLine(terminal) as line:
        for step in (1, 2):
            terminal.clock += 2
            line.draw("base", "base", step, 4, unit="step")
    assert terminal.lines[-2].endswith("| 1/4 [00:02<00:06,  2.00s/step]")  # the first step began with the line
    assert terminal.lines[-1].startswith("base:  50%|")
    assert terminal.lines[-1].endswith("| 2/4 [00:04<00:04,  2.00s/step]")


@pytest.mark.parametrize("stages", [("base", "refiner"), ("base", "base")])
def test_another_count_starts_its_time_anew(terminal: Any, stages: tuple[str, str]) -> None:
    with ProgressLine(terminal) as line:
        terminal.clock = 100
        line.draw(stages[0], stages[0], 3, 3, unit="step")
        terminal.clock = 101
        line.draw(stages[1], stages[1], 1, 3, unit="step")
    assert terminal.lines[-1].startswith(f"{stages[1]}:  33%|")
    assert terminal.lines[-1].endswith("| 1/3 [00:01<00:02,  1.00step/s]")


def test_another_text_keeps_the_count(terminal: Any) -> None:
    with ProgressLine(terminal) as line:
        line.draw("unet", "unet: parsing", 0.0, 1, note="1.0 GB")
        terminal.clock = 30
        line.draw("unet", "unet: building", 0.25, 1, note="5.3 GB")
        line.draw("unet", "unet: building", 0.5, 1, note="5.4 GB")
        line.draw("unet", "unet: building", 0.6, 1, note="5.5 GB")  # too soon to be drawn
    assert terminal.lines[-2].startswith("unet: building:  25%|")
    assert terminal.lines[-2].endswith("| [00:30<01:30, 5.3 GB]")
    assert terminal.lines[-1].endswith("| [00:30<00:30, 5.4 GB]")


def test_without_a_total_there_is_no_bar(terminal: Any) -> None:
    with ProgressLine(terminal) as line:
        line.draw("bench", "eager: round 1 of 7")
        terminal.clock = 5
        line.draw("bench", "eager: round 2 of 7")
    assert terminal.lines == ["eager: round 1 of 7 [00:00]"] * 2 + ["eager: round 2 of 7 [00:05]"]


def test_the_line_is_cleared_and_has_no_colours(terminal: Any) -> None:
    with ProgressLine(terminal) as line:
        line.draw("base", "base", 1, 2, unit="step")
    *_, drawn, blank, end = terminal.getvalue().split("\r")
    assert (blank, end) == (" " * len(drawn), "")
    assert "\x1b" not in terminal.getvalue()


def test_only_a_terminal_is_drawn_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)  # an import would fail
    stream = io.StringIO()
    with ProgressLine(stream) as line:
        line.draw("base", "base", 1, 2, unit="step")
    assert stream.getvalue() == ""


def test_nothing_is_drawn_where_tqdm_is_switched_off(terminal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tqdm.tqdm", functools.partial(tqdm.tqdm, disable=True))  # what TQDM_DISABLE=1 does
    with ProgressLine(terminal) as line:
        for step in (1, 2, 1):
            line.draw("base", f"base {step}", step, 2, unit="step")
    assert terminal.getvalue() == ""


def test_a_warning_is_a_line_above(terminal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal)

    def work(_: object) -> None:
        with ProgressLine() as line:
            line.draw("base", "base", 1, 2, unit="step")
            logging.getLogger("sdxl_trt.test").warning("odd")

    assert run(Parser(prog="trt-test"), work, []) == 0
    drawn, said = terminal.getvalue().split("warning: odd\n")
    assert drawn.endswith("\r")
    assert said.startswith("\rbase:  50%|")
