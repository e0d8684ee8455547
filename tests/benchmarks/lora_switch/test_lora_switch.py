"""The benchmark of switching a LoRA: what its process measures, with a stand-in engine, and its report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from sdxl_trt.benchmarks.lora_switch import __main__ as lora_switch
from sdxl_trt.benchmarks.lora_switch import child
from sdxl_trt.benchmarks.lora_switch.__main__ import Report, bars, prepare, table
from sdxl_trt.benchmarks.lora_switch.child import Found
from sdxl_trt.benchmarks.measure.processes import Measured
from sdxl_trt.engines.adapters.file import open_lora
from sdxl_trt.engines.bundle.bundle import Bundle, read_bundle
from sdxl_trt.mini.embedded import bundle_path


class StandIn:
    """An engine that says what it was asked."""

    asked: list[str]

    def __init__(self, bundle: Bundle, name: str) -> None:
        self.component = bundle.manifest.components[name]
        StandIn.asked = []
        self._loras = 0

    def __getattr__(self, name: str) -> Any:
        return lambda: StandIn.asked.append(name)

    def adapt(self, loras: Sequence[Any]) -> None:
        self._loras = len(loras)
        StandIn.asked.append(f"adapt {len(loras)}")

    def infer(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        StandIn.asked.append("infer")
        return {"out_sample": inputs["sample"] + np.float16(self._loras)}


@pytest.fixture
def small(tmp_path: Path) -> tuple[Bundle, Path, int]:
    """Return the embedded bundle as if the benchmark had made it, with the LoRA that the benchmark writes."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "bundle").symlink_to(bundle_path(), target_is_directory=True)
    return prepare(tmp_path, "tiny")


def test_the_lora_is_of_every_linear_layer_of_the_transformers(small: tuple[Bundle, Path, int]) -> None:
    bundle, path, layers = small
    lora = open_lora(path)
    assert len(lora.branches["unet"]) == layers > 50
    assert {branch.rank for branch in lora.branches["unet"]} == {lora_switch.RANK}
    assert prepare(path.parent.parent, "tiny")[1:] == (path, layers)
    assert bundle.manifest == read_bundle(bundle_path()).manifest


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("plain", ["prefetch", "unload", "adapt 0", "load"]),
        ("lora", ["prefetch", "unload", "adapt 1", "load"]),
        ("switch", ["prefetch", "unload", *(word for count in (0, 1, 0)
                                            for word in (f"adapt {count}", "load", "infer", "infer"))]),
    ],
)  # fmt: skip
def test_each_process_does_what_its_name_says(
    what: str, expected: list[str], small: tuple[Bundle, Path, int], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(child, "OrtEngine", StandIn)
    bundle, path, _ = small
    assert child.main([what, str(bundle.root), str(path), "--side", "8", "--steps", "1"]) == 0
    assert StandIn.asked == expected
    found = msgspec.json.decode(capsys.readouterr().out, type=Found)
    assert found.equal
    assert len(found.loads) == (3 if what == "switch" else 1)
    assert found.moved == pytest.approx(1.0 if what == "switch" else 0.0, abs=0.01)  # fp16


def _measured(anonymous: int) -> Measured:
    return Measured(("python",), 0, 1.0, anonymous, anonymous, 0, "")


RUNS = {"plain": _measured(10**9), "lora": _measured(2 * 10**9), "switch": _measured(2 * 10**9)}


def _found(during: float, *, equal: bool = True) -> Found:
    return Found(0.1, [1.0, 2.0, 1.0], [[1.0, 1.0, 9.0], [during] * 3, [1.2] * 3], 0.5, equal)


@pytest.mark.parametrize(
    ("during", "equal", "touched", "met"),
    [
        (1.1, True, 0, [True, True, True]),
        (1.2, True, 0, [False, True, True]),
        (1.1, False, -(10**9), [True, False, False]),
    ],
)
def test_bars(during: float, equal: bool, touched: int, met: list[bool]) -> None:
    found = {"plain": _found(1.0), "lora": _found(1.0), "switch": _found(during, equal=equal)}
    assert [bar.met for bar in bars(RUNS, found, touched)] == met
    assert [bar.met for bar in bars(RUNS, {}, touched)] == [None] * 3


def test_the_table_has_a_line_for_each_process_and_names_the_command() -> None:
    found = {"plain": _found(1.0), "switch": _found(1.1)}
    runs = {**RUNS, "lora": msgspec.structs.replace(RUNS["lora"], exit_code=9)}
    report = Report({"cores": 2}, {}, "tiny", 64, 16, 722, 5 * 10**9, 4 * 10**9, (0.1, 0.2), runs, found,
                    bars(runs, found, 4 * 10**9))  # fmt: skip
    text = table(report)
    assert "`python -m sdxl_trt.benchmarks.lora_switch`, size tiny" in text
    assert "| without, with, and without it again | 1.0 s, 2.0 s, 1.0 s | 1.00 s, 1.10 s, 1.20 s | 2.00 GB |" in text
    assert "| with the LoRA | failed, exit code 9 |" in text
