"""trt-inspect from the user's side: lines, JSON, exit codes, with and without a GPU."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from sdxl_trt.engines.backends.cuda.driver import Driver, Problem
from sdxl_trt.engines.bundle.bundle import Bundle, read_bundle, write_manifest
from sdxl_trt.engines.bundle.plan_record import PlanRecord
from sdxl_trt.engines.cli import main as trt_inspect
from sdxl_trt.engines.inspection import doctor
from sdxl_trt.engines.inspection.compare import compare_engines
from sdxl_trt.engines.inspection.doctor import DoctorReport
from sdxl_trt.mini.embedded import bundle_path


@pytest.fixture
def planned(simulated: Any, tmp_path: Path) -> Bundle:
    """Return the embedded pair with plans of the decoder and one text encoder for the simulated GPU."""
    bundle = read_bundle(simulated.bundle(bundle_path(), tmp_path / "planned", height=64, width=64))
    kept = tuple(record for record in bundle.manifest.plans if record.key.component in ("text_encoder", "vae_decoder"))
    write_manifest(bundle.root, msgspec.structs.replace(bundle.manifest, plans=kept))
    return read_bundle(bundle.root)


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = trt_inspect(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_embedded_bundle(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _run(capsys, str(bundle_path()), "--why-rebuild")
    assert (code, err) == (0, "")
    assert "refiner_unet" in out
    assert "plans: none" in out


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _run(capsys, str(bundle_path()), "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["precision"] == "fp16"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere"], 2, "no such folder; make one with: export-engines"),
        (["empty"], 2, "is not a bundle"),
        (["bundle", "--verify", "ort"], 2, "no plans to verify"),
        (["broken"], 4, "broken manifest"),
        (["broken", "--why-rebuild"], 4, "broken manifest"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "broken"):
        Path(name).mkdir()
    Path("broken/manifest.json").write_text("{")
    Path("bundle").symlink_to(bundle_path())
    found, out, err = _run(capsys, *arguments)
    assert (found, out) == (code, "")
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [[], ["a", "--verify", "torch"], ["a", "--why"], ["a", "--doctor"], ["--doctor", "--json", "a"]]
)
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        trt_inspect(arguments)
    assert caught.value.code == 2
    assert "see trt-inspect --help" in capsys.readouterr().err


def test_the_doctor_does_not_examine_bundles(capsys: pytest.CaptureFixture[str]) -> None:
    for option in (["--why-rebuild"], ["--verify", "ort"]):
        code, out, err = _run(capsys, "--doctor", *option)
        assert (code, out) == (2, "")
        assert "--doctor examines the machine" in err


@pytest.mark.parametrize("starts", [True, False])
def test_the_doctor_exits_3_if_no_provider_uses_a_gpu(
    starts: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    problem = None if starts else Problem("libcublas.so.13 is missing", "pip install it")
    report = DoctorReport(Driver((13, 0)), {}, {"ort-cpu": None, "ort-cuda": problem})
    monkeypatch.setattr(doctor, "examine_machine", lambda: report)
    code, out, err = _run(capsys, "--doctor")
    assert code == (0 if starts else 3)
    assert out.splitlines() == report.lines
    said = "error: no provider can use a GPU here: libcublas.so.13 is missing; pip install it\n"
    assert err == ("" if starts else said)
    code, out, _ = _run(capsys, "--doctor", "--json")
    assert code == (0 if starts else 3)
    assert json.loads(out)["providers"]["ort-cuda"]["starts"] == starts


def test_usable_plans_are_reported(planned: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capsys, str(planned.root), "--why-rebuild", "--json")
    assert code == 0
    (rebuild,) = json.loads(out)["rebuild"]
    statuses = {each["component"]: each["status"] for each in rebuild["components"]}
    assert rebuild["problem"] == ""
    assert statuses["vae_decoder"] == statuses["text_encoder"] == "usable"
    assert statuses["unet"] == "missing"


def test_tensorrt_agrees_with_onnx_runtime(planned: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _run(capsys, str(planned.root), "--verify", "ort")
    assert (code, err) == (0, "")
    assert "tensorrt against ort-cpu" in out
    assert len(re.findall(r"  agrees$", out, re.MULTILINE)) == 2
    assert "(worst of " in out


def _plan_of_other_weights(simulated: Any, source: Bundle, name: str, folder: Path) -> PlanRecord:
    """Return the record of a plan in `folder`, built from weights with a thousand signs flipped."""
    root = Path(shutil.copytree(bundle_path(), folder / "other"))
    component = source.manifest.components[name]
    file = root / component.weights.file
    weights = np.fromfile(file, np.float16)
    weights[int(0.9 * len(weights)) :][:1000] *= -1
    weights.tofile(file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    other = msgspec.structs.replace(component, weights=msgspec.structs.replace(component.weights, sha256=digest))
    parts = {**source.manifest.components, name: other}
    write_manifest(root, msgspec.structs.replace(source.manifest, components=parts, plans=()))
    built = read_bundle(simulated.bundle(root, folder / "built", height=64, width=64))
    return next(record for record in built.manifest.plans if record.key.component == name)


def test_a_plan_that_differs_exits_1(
    simulated: Any, planned: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plan's digest is right and its key names the bundle's weights, but it was built from others."""
    wrong = _plan_of_other_weights(simulated, planned, "vae_decoder", tmp_path)
    shutil.copy(tmp_path / "built" / wrong.file.file, planned.root / wrong.file.file)
    weights = planned.manifest.components["vae_decoder"].weights.sha256
    wrong = msgspec.structs.replace(wrong, key=msgspec.structs.replace(wrong.key, weights=weights))
    kept = [record for record in planned.manifest.plans if record.key.component != "vae_decoder"]
    write_manifest(planned.root, msgspec.structs.replace(planned.manifest, plans=(*kept, wrong)))
    code, out, err = _run(capsys, str(planned.root), "--verify", "ort", "--json")
    assert code == 1
    agreements = json.loads(out)["verify"]["agreements"]
    assert {each["component"] for each in agreements if not each["passed"]} == {"vae_decoder"}
    assert "tensorrt differs from ort-cpu: vae_decoder sample: largest error" in err
    assert err.count("\n") == 1


def test_device_memory_is_freed(simulated: Any, planned: Bundle) -> None:
    compare_engines(planned, ["vae_decoder"], "tensorrt", "ort-cpu")
    assert simulated.current_bytes == 0


def test_verifying_needs_tensorrt(planned: Bundle, simulated: Any, capsys: pytest.CaptureFixture[str]) -> None:
    simulated.remove()
    code, out, err = _run(capsys, str(planned.root), "--verify", "ort")
    assert (code, out) == (3, "")
    assert "pip install" in err


def test_inspecting_imports_no_backend(tmp_path: Path) -> None:
    """Reading a bundle's records needs neither ONNX Runtime nor Polygraphy nor TensorRT."""
    shutil.copytree(bundle_path(), tmp_path / "bundle")
    code = f"""
import sys
for name in ("onnxruntime", "polygraphy", "tensorrt", "tensorrt_rtx", "cuda", "torch", "onnx"):
    sys.modules[name] = None
from sdxl_trt.engines.cli import main
sys.exit(main([{str(tmp_path / "bundle")!r}, "--why-rebuild"]))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "pip install" in " ".join(done.stdout.split())
