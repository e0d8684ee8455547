"""Subjects are found, exported once, and named without local paths."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdxl_trt.benchmarks.contest.inputs import draw_inputs, unet_rows, write_inputs
from sdxl_trt.benchmarks.contest.roster import ROSTER, choose, command, shown, unable
from sdxl_trt.benchmarks.measure import subjects
from sdxl_trt.benchmarks.measure.processes import Measured
from sdxl_trt.benchmarks.measure.subjects import find_subject
from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.engines.errors import CorruptError, SdxlTrtError, UsageError
from sdxl_trt.mini.embedded import bundle_path


def _silent(_: str) -> None: ...


def _exports(result: Callable[[list[str]], Measured]) -> list[list[str]]:
    """Replace export processes by `result`; return the list of their commands."""
    asked: list[list[str]] = []

    def run(command: list[str]) -> Measured:
        asked.append(command)
        return result(command)

    subjects.measure = run  # type: ignore[assignment]
    return asked


@pytest.fixture(autouse=True)
def _measure_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subjects, "measure", subjects.measure)


def test_the_default_is_the_embedded_pair(tmp_path: Path) -> None:
    found = find_subject(None, None, None, tmp_path, _silent)
    assert found.embedded
    assert found.bundle.root == bundle_path()
    assert Path(found.base, "unet", "config.json").is_file()
    assert Path(found.refiner, "unet", "config.json").is_file()
    assert found.name == "the embedded pair's"


def test_a_bundle_alone_has_no_checkpoint(tmp_path: Path) -> None:
    found = find_subject(bundle_path(), None, None, tmp_path, _silent)
    assert (found.base, found.refiner, found.model) == ("", "", "")
    reason = unable(ROSTER["eager"], checkpoint=bool(found.base), gpu=False)
    assert reason.endswith("--model SRC --refiner SRC")


def test_a_refiner_alone_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--refiner"):
        find_subject(None, None, "somewhere", tmp_path, _silent)


def test_a_model_is_exported_once_in_fp32_and_named_by_its_folder(tmp_path: Path) -> None:
    def exported(command: list[str]) -> Measured:
        target = Path(command[command.index("--out") + 1])
        if not target.exists():
            target.symlink_to(bundle_path())
        return Measured((), 0, 1.0, 1, 1, 1, "")

    asked = _exports(exported)
    base = tmp_path / "my-base"
    base.mkdir()
    first, second = (find_subject(None, str(base), "owner/refiner", tmp_path, _silent) for _ in range(2))
    assert asked[0] == asked[1]
    assert "--fp32" in asked[0]
    assert asked[0][asked[0].index("--base") + 1] == str(base)
    assert asked[0][asked[0].index("--refiner") + 1] == "owner/refiner"
    assert first.cache == second.cache
    assert (first.model, first.base, first.refiner) == ("my-base", str(base), "owner/refiner")
    find_subject(None, "owner/base", None, tmp_path, _silent)
    assert "--no-refiner" in asked[2]
    assert asked[2][asked[2].index("--out") + 1] != asked[0][asked[0].index("--out") + 1]


@pytest.mark.parametrize(("code", "error"), [(2, UsageError), (4, CorruptError), (1, SdxlTrtError), (-9, SdxlTrtError)])
def test_an_export_that_fails_keeps_its_exit_code(tmp_path: Path, code: int, error: type[SdxlTrtError]) -> None:
    _exports(lambda _: Measured((), code, 1.0, 1, 1, 1, "reading\nerror: nothing there; look elsewhere"))
    with pytest.raises(error, match=r"^nothing there; look elsewhere$") as caught:
        find_subject(None, "nowhere", None, tmp_path, _silent)
    assert caught.value.exit_code == (code if code > 0 else 1)


def test_inputs_fit_the_graphs_and_are_reproducible(tmp_path: Path) -> None:
    bundle = read_bundle(bundle_path())
    asked: dict[str, Any] = {"width": 128, "height": 64, "batch": 2, "guidance": 5.0, "seed": 3, "prompt": "a red star"}
    drawn = draw_inputs(bundle, **asked)
    write_inputs(tmp_path / "new" / "inputs.npz", drawn)
    kept = np.load(tmp_path / "new" / "inputs.npz")
    again = draw_inputs(bundle, **asked)
    assert set(kept) == set(again)
    for name, array in again.items():
        np.testing.assert_array_equal(kept[name], array)
    for stage, expert in bundle.manifest.stages().items():
        for spec in bundle.manifest.components[expert.unet].inputs:
            given = kept[f"{stage}/{spec.name}"].shape
            assert given[0] == 4
            assert len(given) == len(spec.shape)
            assert all(isinstance(dim, str) or dim == size for dim, size in zip(spec.shape, given, strict=True))
    assert kept["base/sample"].shape[2:] == (8, 16)
    assert kept["refiner/time_ids"][0].tolist() == [64, 128, 0, 0, 6]
    assert kept["ids/0"].shape == (2, 77)
    assert not np.array_equal(kept["ids/0"][0], kept["ids/0"][1])
    assert (unet_rows(2, 1.0), unet_rows(2, 1.5)) == (2, 4)


def test_against_selects_the_contestants() -> None:
    assert [entry.name for entry in choose("compile, eager,eager")] == ["sdxl-trt", "compile", "eager"]
    assert [entry.name for entry in choose("none")] == ["sdxl-trt"]
    assert [entry.name for entry in choose(None)] == list(ROSTER)
    for wrong in ("eagre", "eager,tensorflow", ","):
        with pytest.raises(UsageError, match="choose from: sdxl-trt-int8, sdxl-trt-openvino, sdxl-trt-fast, "):
            choose(wrong)


def test_the_reason_why_a_contestant_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdxl_trt.benchmarks.contest.roster.find_spec", lambda name: None)
    monkeypatch.setattr("sdxl_trt.benchmarks.contest.roster.peers", lambda: None)
    reasons = {name: unable(entry, checkpoint=True, gpu=False) for name, entry in ROSTER.items()}
    assert reasons["sdxl-trt"] == ""
    assert reasons["ort-cuda"] == reasons["eager-fp16"] == "there is no NVIDIA GPU"
    assert "make peers" in reasons["openvino"]
    assert reasons["eager"] == "torch is not installed; pip install 'sdxl-trt[cpu,export]'"
    left_out = {
        name for name, entry in ROSTER.items() if "--quick" in unable(entry, checkpoint=True, gpu=False, quick=True)
    }
    assert left_out == {
        "sdxl-trt-int8",
        "compile",
        "compile-bf16",
        "optimum",
        *(name for name in ROSTER if name.startswith("openvino")),
    }
    assert "only on CPUs" in unable(ROSTER["openvino"], checkpoint=True, gpu=True)


def test_a_command_is_shown_without_local_paths(tmp_path: Path) -> None:
    line = shown(command(ROSTER["eager"], tmp_path / "spec.json"))
    assert line == ("python", "-m", "sdxl_trt.benchmarks.contestants", "spec.json", "eager")
