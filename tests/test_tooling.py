"""The checkers themselves: one that sees no files would find no errors."""

import os
import shutil
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
    folders = ("engines", "export", "runtime", "server", "mini", "benchmarks", "sdxl_trt", "examples", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 850
    long = {path.relative_to(ROOT).as_posix() for path in files if len(path.read_text().splitlines()) > 450}
    assert long == set()


def test_git_converts_no_line_ending() -> None:
    """Git for Windows does by default, and files with other digests than the manifest's would be refused."""
    command = ["git", "check-attr", "text", "mini/bundle/tokenizer/tokenizer.json", "tests/comfyui/graphs"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert [line.rpartition(": ")[2] for line in result.stdout.splitlines()] == ["unset", "unset"]


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_gpu_check_installs_what_the_driver_runs(tmp_path: Path) -> None:
    """With a stand-in for Python that records its calls: nothing is installed before the driver has answered."""
    runtime, record = tmp_path / "runtime", tmp_path / "calls"
    (runtime / "bin").mkdir(parents=True)
    python = runtime / "bin" / "python"
    python.write_text(f"""#!/bin/sh
case "$*" in *--look) echo "$SAID"; exit $CODE;; *) echo "$*" >> {record};; esac
case "$2" in venv) mkdir -p "$3/bin"; cp {python} "$3/bin/python";; esac
""")
    python.chmod(0o755)
    (runtime / ".runtime").touch()
    command = [
        "make",
        "--no-print-directory",
        "gpu-check",
        "QUICK=1",
        f"VENV={runtime}",
        f"GPU={tmp_path / 'gpu'}",
        f"PYTHON={python}",
    ]

    def make(said: str, code: int = 0) -> tuple[int, str, list[str]]:
        record.write_text("")
        environment = os.environ | {"SAID": said, "CODE": str(code)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, [line for line in record.read_text().splitlines() if " install " in line]

    code, out, installs = make("**no GPU**: none", 3)
    assert (code != 0, out, installs) == (True, "**no GPU**: none\n", [])
    for extras, file in (("gpu-cu12,tensorrt-cu12,verify", "-cu12"), ("gpu,tensorrt,verify", "")):
        code, out, (install,) = make(extras)
        assert (code, out) == (0, ""), "only the report goes to stdout"
        assert install.endswith(f"--constraint constraints{file}.txt --editable .[{extras}]")
        assert make(extras)[2] == []


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_gpu_check_runs_nothing_when_make_only_prints(tmp_path: Path) -> None:
    runtime, record = tmp_path / "runtime", tmp_path / "calls"
    (runtime / "bin").mkdir(parents=True)
    python = runtime / "bin" / "python"
    python.write_text(f"#!/bin/sh\necho called >> {record}\n")
    python.chmod(0o755)
    (runtime / ".runtime").touch()
    command = ["make", "-n", "gpu-check", "BUNDLE=a b", f"VENV={runtime}", f"GPU={tmp_path / 'gpu'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert '--bundle "a b"' in done.stdout
    assert not record.exists()
