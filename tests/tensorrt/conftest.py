"""The real TensorRT in child processes, so that NVIDIA's libraries are not loaded into the tests' own."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sdxl_trt.benchmarks.full_size.tensorrt_on_cpu import assemble, child_environment, unavailable


@pytest.fixture(scope="session")
def tensorrt_folder() -> Path:
    """Return the folder from which child processes import TensorRT."""
    reason = unavailable()
    if reason:
        pytest.skip(f"no TensorRT parser: {reason}")
    return assemble()


@pytest.fixture
def tensorrt(tensorrt_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let child processes of this test import TensorRT, both flavours."""
    monkeypatch.setenv("PYTHONPATH", child_environment(tensorrt_folder)["PYTHONPATH"])


@pytest.fixture(scope="session")
def run_parser(tensorrt_folder: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Return a function that parses graphs and returns (exit code, report)."""

    def run(*arguments: str | Path) -> tuple[int, dict[str, Any]]:
        command = [
            sys.executable,
            "-W",
            "error",
            "-m",
            "sdxl_trt.benchmarks.full_size.parse",
            "--json",
            *map(str, arguments),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.stdout, done.stderr
        return done.returncode, msgspec.json.decode(done.stdout)

    return run
