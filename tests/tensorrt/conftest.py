"""The real TensorRT parser, in a process of its own: what NVIDIA's libraries load there stays out of the tests."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sdxl_trt.benchmarks.tensorrt_on_cpu import unavailable


@pytest.fixture(scope="session")
def run_parser() -> Callable[..., tuple[int, dict[str, Any]]]:
    """Return a function that parses graphs and returns the exit code and the report."""
    reason = unavailable()
    if reason:
        pytest.skip(f"no TensorRT parser: {reason}")

    def run(*arguments: str | Path) -> tuple[int, dict[str, Any]]:
        command = [sys.executable, "-W", "error", "-m", "sdxl_trt.benchmarks.parse", "--json", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.stdout, done.stderr
        return done.returncode, msgspec.json.decode(done.stdout)

    return run
