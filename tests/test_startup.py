"""Startup: --help and an import of the package load nothing that they do not need."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

SCRIPTS = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]["scripts"]
HEAVY = {"PIL", "cuda", "msgspec", "numpy", "onnx", "onnx_ir", "onnxruntime", "polygraphy", "safetensors", "tensorrt",
         "tokenizers", "torch", "tqdm"}  # fmt: skip
SLOW = {"dataclasses", "inspect", "json", "logging", "shutil", "tempfile", "traceback"}
"""Slow modules of the standard library that neither needs."""


def _loaded(code: str) -> set[str]:
    """Return the modules that `code` loads, beside those that Python and the environment load for themselves."""
    before, after = "import sys; before = set(sys.modules)", "sys.stderr.write(' '.join(set(sys.modules) - before))"
    command = [sys.executable, "-c", f"{before}\n{code}\n{after}"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stderr.split())


@pytest.mark.parametrize("command", SCRIPTS)
def test_help_loads_nothing_heavy(command: str) -> None:
    module, _, function = SCRIPTS[command].partition(":")
    run = f"from {module} import {function}\ntry:\n    {function}(['--help'])\nexcept SystemExit:\n    pass"
    loaded = _loaded(run)
    assert "argparse" in loaded
    assert loaded & HEAVY == set()
    if command == "trt-generate":
        assert loaded & SLOW == set()


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = _loaded("import sdxl_trt; dir(sdxl_trt); sdxl_trt.SdxlTrtError")
    assert "sdxl_trt.engines.errors" in loaded
    assert loaded & (HEAVY | SLOW) == set()


def test_runs_without_loras_do_not_load_safetensors() -> None:
    loaded = _loaded("from sdxl_trt.runtime import open_bundle\nimport sdxl_trt.engines.backends.ort.engine\n"
                     "with open_bundle() as pipeline: assert pipeline.pool.phase")  # fmt: skip
    assert "sdxl_trt.engines.adapters.scaled" in loaded
    assert "safetensors" not in loaded
