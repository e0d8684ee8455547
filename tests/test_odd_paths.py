"""Commands with paths that are not UTF-8, which must not break their output."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sdxl_trt.mini.embedded import bundle_path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")


def _command(module: str, *arguments: Path | str, encoding: str = "utf-8") -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {"PYTHONIOENCODING": f"{encoding}:strict"}
    words = [sys.executable, "-m", f"sdxl_trt.{module}", *map(os.fsencode, arguments)]
    return subprocess.run(words, capture_output=True, check=False, env=environment)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose name has a byte that is not UTF-8, and spaces."""
    folder = tmp_path / os.fsdecode(b"caf\xe9  two")
    folder.mkdir()
    return folder


def test_pictures_are_written_to_odd_paths(folder: Path) -> None:
    bundle, prompts = folder / "bundle", folder / os.fsdecode(b"p\xff.txt")
    shutil.copytree(bundle_path(), bundle)
    prompts.write_text("a red star\n")
    out = folder / os.fsdecode(b"o\xfe.png")
    fast = ("--steps", "2", "--seed", "3", "--no-refiner")
    run = _command("runtime.cli", "--engines", bundle, "--prompts", prompts, "-o", out, *fast)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(os.fsencode(out) + b"  seed 3"), "what is printed names the file, byte for byte"
    assert out.is_file()


@pytest.mark.parametrize(
    ("encoding", "options", "message"),
    [("utf-8", ("--prompts",), b"check the path"), ("ascii", ("a fox", "--engines"), b"no such folder")],
)
def test_a_missing_odd_path_is_one_line(folder: Path, encoding: str, options: tuple[str, ...], message: bytes) -> None:
    run = _command("runtime.cli", *options, folder / "none", encoding=encoding)
    assert (run.returncode, run.stdout) == (2, b""), run.stderr
    assert run.stderr.startswith(b"error: ")
    assert run.stderr.count(b"\n") == 1
    assert message in run.stderr
    assert b"caf\\xe9" in run.stderr
