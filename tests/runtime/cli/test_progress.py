"""trt-generate on a terminal: every stage is shown, and the line is gone at the end."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from sdxl_trt.runtime.cli.progress import STAGES
from sdxl_trt.runtime.pipeline.run import PhaseName


def test_every_phase_has_a_name_and_a_unit() -> None:
    assert set(STAGES) == set(get_args(PhaseName))


@pytest.mark.slow
def test_the_stages_pass_and_leave_nothing(tmp_path: Path) -> None:
    ours, its = pty.openpty()  # it has no size
    command = [sys.executable, "-m", "sdxl_trt.runtime.cli", "a star", "--steps", "4", "--json", "-o", "star.png"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=its, cwd=tmp_path, env={**os.environ, "NO_COLOR": "1"}
    ) as child:
        os.close(its)
        seen = b""
        while chunk := _read(ours):
            seen += chunk
        assert child.stdout
        assert json.load(child.stdout)["images"][0]["path"] == "star.png"
    os.close(ours)
    shown = seen.decode()
    places = [shown.index(f"\r{name}: ") for name in ("reading the prompt", "loading", "base", "refiner", "decoding")]
    assert places == sorted(places)
    assert "step/s]" in shown
    assert shown.endswith(" \r")  # overwritten with blanks
    assert "\x1b" not in shown


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # the other end is closed
        return b""
