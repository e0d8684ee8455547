"""The contestant sdxl-trt-int8 exports a bundle of its own, once, and says why if that fails."""

import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sdxl_trt.benchmarks.contestants import ours
from sdxl_trt.benchmarks.contestants.protocol import Spec

SPEC = Spec(name="sdxl-trt-int8", bundle="", base="a base", refiner="a refiner", inputs="", cache="", device="cpu",
            threads=2, prompt="", width=64, height=64, batch=1, steps=4, handoff=0.8, guidance=5.0, seed=0)  # fmt: skip


def _spec(cache: Path, refiner: str = "a refiner") -> Spec:
    return msgspec.structs.replace(SPEC, cache=str(cache), refiner=refiner)


def _runs(monkeypatch: pytest.MonkeyPatch, code: int = 0, stderr: str = "") -> list[list[str]]:
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return asked


def test_the_bundle_is_exported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _runs(monkeypatch)
    assert ours._exported(_spec(tmp_path)) == ours._exported(_spec(tmp_path)) == tmp_path / "bundle-int8"
    (command,) = asked
    assert command[command.index("--base") + 1] == "a base"
    assert command[command.index("--refiner") + 1] == "a refiner"
    assert "--int8" in command
    assert command[command.index("--vae-precision") + 1] == "int8"
    assert float(ours._seconds(tmp_path / "bundle-int8").read_text()) >= 0


def test_without_a_refiner_none_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _runs(monkeypatch)
    ours._exported(_spec(tmp_path, ""))
    assert "--no-refiner" in asked[0]


def test_an_export_that_fails_is_the_reason_and_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _runs(monkeypatch, 2, "reading\nerror: no memory; close something\n")
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"^export-engines --int8 --vae-precision int8: no memory; close something$"
        ):
            ours._exported(_spec(tmp_path))
    assert len(asked) == 2
