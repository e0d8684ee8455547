"""export-engines builds plans with the real builder: into the bundle, kept while they fit, built again when not."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdxl_trt.benchmarks.tensorrt_on_cpu import assemble, unavailable
from sdxl_trt.engines.bundle import Bundle, read_bundle
from sdxl_trt.engines.digests import verify_file
from sdxl_trt.engines.plans import read_plan
from sdxl_trt.engines.profiles import fixed

pytestmark = pytest.mark.slow
RTX = ("--engine", "tensorrt-rtx", "--json")
FEW = ("--components", "unet,vae_decoder")
Command = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture(scope="module")
def command() -> Command:
    """Return a function that runs export-engines where `tensorrt_rtx` can be imported."""
    reason = unavailable()
    if reason:
        pytest.skip(f"no TensorRT builder: {reason}")
    environment = os.environ | {"PYTHONPATH": str(assemble())}

    def run(*arguments: str | Path, with_tensorrt: bool = True) -> tuple[int, dict[str, Any], str]:
        line = [sys.executable, "-m", "sdxl_trt.export.cli", *map(str, arguments)]
        settings = environment if with_tensorrt else None
        done = subprocess.run(line, capture_output=True, text=True, check=False, env=settings)
        return done.returncode, json.loads(done.stdout) if done.stdout else {}, done.stderr

    return run


@pytest.fixture(scope="module")
def planned(command: Command, pairs: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle with plans of UNet and decoder: shared, not to be changed."""
    root = Path(shutil.copytree(pairs("outline").bundle, tmp_path_factory.mktemp("planned") / "bundle"))
    code, told, errors = command(*RTX, *FEW, "--out", root)
    assert code == 0, errors
    assert {plan["component"] for plan in told["plans"]} == {"unet", "vae_decoder"}
    return root


@pytest.fixture
def copied(planned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(planned, tmp_path / "bundle"))


def _plans(root: Path) -> dict[str, Any]:
    return {record.key.component: record for record in read_bundle(root, partial=True).manifest.plans}


def test_plans_are_in_the_manifest_with_all_that_decides_them(planned: Path) -> None:
    bundle = read_bundle(planned)
    for name, record in _plans(planned).items():
        component = bundle.manifest.components[name]
        assert (record.key.graph, record.key.weights) == (component.graph.sha256, component.weights.sha256)
        assert record.key.environment.flavour == "tensorrt-rtx"
        assert record.key.environment.gpu == "any"
        assert len(read_plan(bundle, record)) == record.file.size > component.weights.size * 0.5
        assert record.memory.activations > 0
        assert (planned / record.log).stat().st_size > 0
    assert {path.name for path in (planned / "plans").iterdir()} == {
        Path(file).name for record in _plans(planned).values() for file in (record.file.file, record.log)
    }


def test_what_fits_is_kept_and_what_does_not_is_built_again(command: Command, copied: Path) -> None:
    before = _plans(copied)
    stamps = {path: path.stat().st_mtime_ns for path in (copied / "plans").glob("*.plan")}
    assert command(*RTX, *FEW, "--out", copied)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in (copied / "plans").glob("*.plan")} == stamps
    code, told, _ = command(*RTX, *FEW, "--batch", "2", "--out", copied, "--dry-run")
    assert code == 0
    assert [(job["component"], job["action"], job["reasons"]) for job in told["plans"]] == [
        ("unet", "build", ["other sizes are asked for"]), ("vae_decoder", "keep", []),
    ]  # fmt: skip
    damaged = copied / before["vae_decoder"].file.file
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff\xff")
    assert command(*RTX, *FEW, "--batch", "2", "--static", "--out", copied)[0] == 0
    after = _plans(copied)
    assert [len(record.key.profiles) for record in (after["unet"], after["vae_decoder"])] == [2, 1]
    assert not (copied / before["unet"].file.file).exists()
    bundle = read_bundle(copied)
    for record in after.values():
        verify_file(bundle.path(record.file), record.file)
    assert after["unet"].key.profiles[1].shapes["sample"][2][0] == fixed(4).max


def test_an_export_of_the_same_keeps_the_plans(command: Command, copied: Path, pairs: Callable[[str], Any]) -> None:
    from sdxl_trt.export import Options, export_bundle

    pair, before = pairs("outline"), _plans(copied)
    export_bundle(pair.base, pair.refiner, copied, Options(precision="fp32"))
    assert _plans(copied) == before


def test_a_plan_of_what_was_exported_anew_is_dropped(copied: Path, tmp_path: Path) -> None:
    import msgspec

    from sdxl_trt.export.unchanged import take_over_plans

    bundle, before = read_bundle(copied), _plans(copied)
    components = dict(bundle.manifest.components)
    graph = msgspec.structs.replace(components["vae_decoder"].graph, sha256="0" * 64)
    components["vae_decoder"] = msgspec.structs.replace(components["vae_decoder"], graph=graph)
    folder = tmp_path / "new"
    folder.mkdir()
    assert take_over_plans(bundle, components, folder) == (before["unet"],)
    assert [path.name for path in (folder / "plans").glob("*.plan")] == [Path(before["unet"].file.file).name]
    # Nothing else may write into the folder, however the umask is set.
    assert (folder / "plans").stat().st_mode & 0o022 == 0


def test_a_bundle_of_plans_alone_cannot_lose_what_has_no_plan(command: Command, copied: Path) -> None:
    code, _, error = command(*RTX, *FEW, "--plans-only", "--out", copied)
    assert code == 2
    assert "text_encoder" in error
    assert read_bundle(copied).manifest.onnx


def test_a_bundle_of_plans_alone(planned: Path, tmp_path: Path) -> None:
    import msgspec

    from sdxl_trt.engines.bundle import write_manifest
    from sdxl_trt.engines.planning import drop_onnx, planned_components

    root = Path(shutil.copytree(planned, tmp_path / "bundle"))
    bundle = read_bundle(root)
    # Which plans they are does not matter here, only that every component has one.
    some = bundle.manifest.plans[0]
    records = tuple(
        msgspec.structs.replace(some, key=msgspec.structs.replace(
            some.key, component=name, profiles=_any_profile(bundle, name)))
        for name in planned_components(bundle.manifest)
    )  # fmt: skip
    write_manifest(root, msgspec.structs.replace(bundle.manifest, plans=records))
    left = drop_onnx(read_bundle(root))
    assert read_bundle(root).manifest == left.manifest
    assert not left.manifest.onnx
    assert list(root.glob("**/*.onnx")) == []
    assert sum(path.stat().st_size for path in root.rglob("*") if path.is_file() and path.suffix != ".plan") < 1 << 20


def _any_profile(bundle: Bundle, name: str) -> Any:
    from sdxl_trt.engines.planning import profiles_of, stage_sizes

    return profiles_of(bundle.manifest.components[name], stage_sizes(bundle.manifest), bundle.manifest.base.vae.factor)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--height", "100"), 2, "multiples of"),
        (("--width", "64:32:128"), 2, "MIN:OPT:MAX"),
        (("--tokens", "78"), 2, "77"),
        (("--components", "unet,brain"), 2, "brain"),
    ],
)
def test_what_cannot_be_built_is_said_before_building(
    command: Command, copied: Path, arguments: tuple[str, ...], code: int, said: str
) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in copied.rglob("*"))
    got, _, error = command(*RTX, *arguments, "--out", copied)
    assert (got, error.count("\n")) == (code, 1), error
    assert said in error
    assert sorted((path, path.stat().st_mtime_ns) for path in copied.rglob("*")) == before


def test_without_tensorrt_the_remedy_is_named(command: Command, copied: Path) -> None:
    code, _, error = command(*RTX, "--out", copied, with_tensorrt=False)
    assert code == 3
    assert "pip install" in error


def test_options_of_plans_need_an_engine(command: Command, tmp_path: Path) -> None:
    code, _, error = command("--static", "--out", tmp_path / "new", with_tensorrt=False)
    assert code == 2
    assert "--engine" in error
