"""TensorRT is assembled once, completely or not at all, and states why it is unavailable."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sdxl_trt.benchmarks.full_size import tensorrt_on_cpu
from sdxl_trt.benchmarks.full_size.tensorrt_on_cpu import (
    CACHE_VARIABLE,
    LINKS,
    PACKAGE,
    PLUGIN,
    assemble,
    child_environment,
    unavailable,
)

needs_wheels = pytest.mark.skipif(bool(unavailable()), reason=f"no TensorRT parser: {unavailable()}")


@needs_wheels
def test_a_folder_is_assembled_once(tmp_path: Path) -> None:
    folder = assemble(tmp_path)
    for link in LINKS:
        assert (folder / PACKAGE / link).resolve().stat().st_size > 1 << 20
    plugin = folder / PACKAGE / PLUGIN
    made = plugin.stat().st_mtime_ns
    assert assemble(tmp_path) == folder
    assert plugin.stat().st_mtime_ns == made
    assert sorted(path.suffix for path in tmp_path.iterdir() if path != folder) == [".lock"]


@needs_wheels
def test_the_default_cache_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert assemble().parent == tmp_path / "sdxl-trt"


@needs_wheels
def test_a_failure_leaves_no_partial_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    with pytest.raises(RuntimeError, match="the C compiler failed"):
        assemble(tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


@needs_wheels
def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(RuntimeError, match="no TensorRT parser: there is no C compiler"):
        assemble(tmp_path)


def test_missing_wheels_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(tensorrt_on_cpu, "BINDING", "no-such-package")
    assert "no-such-package" in str(unavailable())


def test_another_platform_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert "arm64" in str(unavailable())


NAMES = """
import json, tensorrt, tensorrt_rtx
print(json.dumps([[m.__version__, m.Builder is tensorrt.Builder, hasattr(m.Builder, "build_serialized_network"),
                   hasattr(m.Builder, "build_serialized_network_to_stream")] for m in (tensorrt, tensorrt_rtx)]))
"""


@needs_wheels
def test_a_child_finds_both_flavours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/no/such/folder")
    folder = assemble()
    environment = child_environment(folder)
    assert environment["PYTHONPATH"] == f"{folder}:/no/such/folder"
    command = [sys.executable, "-W", "error", "-c", NAMES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    enterprise, rtx = json.loads(done.stdout)
    assert enterprise == ["11.4.0.106", True, True, False], "the broken call is removed"
    assert rtx[1:] == enterprise[1:]
    assert rtx[0].count(".") == 2


@needs_wheels
def test_the_binding_itself_is_unchanged() -> None:
    code = "import tensorrt_bindings as t; print(hasattr(t.Builder, 'build_serialized_network_to_stream'))"
    environment = child_environment(assemble())
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
