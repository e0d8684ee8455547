"""A bundle of format 1 with plans, written by an older version: it opens, draws the same, and its plans are current."""

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sdxl_trt.engines.build import plan_builds
from sdxl_trt.engines.bundle import Bundle, Environment, Range, read_bundle
from sdxl_trt.engines.cli import main as trt_inspect
from sdxl_trt.engines.plans import find_plan, plan_path, stage_sizes
from sdxl_trt.runtime import Request, open_bundle

HERE = Path(__file__).parent
EXPECTED = json.loads((HERE / "expected.json").read_text(encoding="utf-8"))
RECORDED = msgspec.convert(EXPECTED["environment"], Environment)
START = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
ROUNDING = 1  # grey levels, between one CPU and another


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """Return a copy that only its owner may write, as plans require, whatever the checkout's umask was."""
    root = Path(shutil.copytree(HERE / "bundle", tmp_path / "bundle"))
    for path in (root, *root.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return read_bundle(root)


@pytest.fixture
def recorded_device(simulated: Any, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the simulated device, as the machine that the plans were built for."""
    simulated.version = RECORDED.tensorrt
    for component in bundle.manifest.components.values():
        files = (bundle.path(component.graph), bundle.path(component.weights))
        simulated.sources[component.graph.sha256 + component.weights.sha256] = files
    monkeypatch.setattr("sdxl_trt.engines.backends.trt.environment.current_environment", lambda _flavour: RECORDED)
    return simulated


def _draw(root: Path, provider: str, name: str) -> NDArray[np.uint8]:
    request = EXPECTED["runs"][name]["request"] | ({"image": START} if name == "img2img" else {})
    with open_bundle(root, provider=provider, plan_for=Request(**request)) as pipeline:
        [picture] = pipeline.generate(Request(**request))
    return np.asarray(picture.image)


def _assert_drawn(found: NDArray[np.uint8], name: str) -> None:
    with Image.open(HERE / EXPECTED["runs"][name]["picture"]) as image:
        expected = np.asarray(image)
    assert found.shape == expected.shape
    worst = int(np.abs(found.astype(int) - expected).max())
    assert worst <= ROUNDING, f"{name} is up to {worst} grey levels away"


@pytest.mark.parametrize("name", EXPECTED["runs"])
def test_it_opens_and_draws_the_same_pictures(bundle: Bundle, name: str) -> None:
    _assert_drawn(_draw(bundle.root, "ort-cpu", name), name)


def test_its_plans_are_current_and_draw_the_same_pictures(
    recorded_device: Any, bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, plan in EXPECTED["plans"].items():
        record = find_plan(bundle, name, RECORDED)
        assert record.key.digest() == plan["key"]
        assert plan_path(record.key) == record.file.file == plan["file"]
        assert msgspec.to_builtins(record.key.flags) == plan["flags"]
    assert trt_inspect([str(bundle.root), "--why-rebuild", "--json"]) == 0
    [rebuild] = json.loads(capsys.readouterr().out)["rebuild"]
    assert {each["component"]: each["status"] for each in rebuild["components"]} == dict.fromkeys(
        EXPECTED["plans"], "usable"
    )
    for name in EXPECTED["runs"]:
        _assert_drawn(_draw(bundle.root, "tensorrt", name), name)
    assert set(recorded_device.executed) == EXPECTED["plans"].keys()


def test_plans_requested_again_are_kept_if_they_have_all_profiles(bundle: Bundle) -> None:
    """With the sizes and options of the fixture, a build for the recorded machine has the same keys.

    Except for UNets: since then their plans hold profiles for the usual size beside the range.
    """
    sides = Range(min=16, opt=32, max=48)
    sizes = msgspec.structs.replace(stage_sizes(bundle.manifest), height=sides, width=sides)
    for record in bundle.manifest.plans:
        [job] = plan_builds(bundle, RECORDED, sizes, record.key.flags, components=[record.key.component])
        if bundle.manifest.components[job.component].kind == "unet":
            assert job.reasons == ("it lacks profiles for some of the requested sizes",)
            assert all(profile in job.key.profiles for profile in record.key.profiles)
        else:
            assert (job.key.digest(), job.record) == (EXPECTED["plans"][job.component]["key"], record), job.reasons


def test_inspect_reports_a_newer_format_in_one_line(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    """trt-generate's own error is tested in test_commands.py."""
    file = bundle.root / "manifest.json"
    manifest = json.loads(file.read_text(encoding="utf-8"))
    assert manifest["format_version"] == 1
    file.write_text(json.dumps(manifest | {"format_version": 2}), encoding="utf-8")
    assert trt_inspect([str(bundle.root)]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "bundle format 2 is newer than this sdxl-trt reads (1)" in captured.err
