"""An export to a folder whose name is not UTF-8, and a run of the command that it suggests."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not allow such names")


def test_the_command_that_an_export_suggests_runs(pairs: Any, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9  two")
    out = folder / os.fsdecode(b"o\xffut")
    export = [sys.executable, "-m", "sdxl_trt.export.cli", "--base", pairs("outline").base, "--no-refiner", "--fp32",
              "--verify", "--engine", "none", "--out", out]  # fmt: skip
    done = subprocess.run([*map(os.fsencode, export)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (out / "manifest.json").is_file()
    suggested = done.stdout.splitlines()[-1]
    assert suggested.startswith(b"next: trt-generate ")
    command = suggested.removeprefix(b"next: ").replace(
        b"trt-generate",
        f"{sys.executable} -m sdxl_trt.runtime.cli --steps 2 --width 32 --height 32".encode(),
        1,
    )
    made = subprocess.run(["bash", "-c", command], capture_output=True, check=False, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert len(list(tmp_path.glob("sdxl-*.png"))) == 1
