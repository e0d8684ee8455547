"""The checkers themselves: one that sees no files would find no errors."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_type_checker_sees_a_planted_error() -> None:
    planted = 'from sdxl_trt.engines.host.files import sha256_file\nx: int = sha256_file("not a path")\n'
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", "-c", planted]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "Found 2 errors" in result.stdout


def test_the_linter_sees_torch_in_the_runtime() -> None:
    command = [sys.executable, "-m", "ruff", "check", "--stdin-filename", "runtime/planted.py", "-"]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, input='"""Planted."""\n\nimport torch\n'
    )
    assert "TID251" in result.stdout


def test_no_file_is_too_long_to_read() -> None:
    folders = ("engines", "export", "runtime", "mini", "benchmarks", "sdxl_trt", "examples")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 330
    assert {path.name for path in files if len(path.read_text().splitlines()) > 450} == set()


def test_git_converts_no_line_ending() -> None:
    """Git for Windows does by default, and files with other digests than the manifest's would be refused."""
    command = ["git", "check-attr", "text", "mini/bundle/tokenizer/tokenizer.json", "tests/comfyui/graphs"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert [line.rpartition(": ")[2] for line in result.stdout.splitlines()] == ["unset", "unset"]
