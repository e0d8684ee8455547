"""export-engines with the real builder: builds plans into the bundle, keeps those that fit, rebuilds the others."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdxl_trt.benchmarks.full_size.tensorrt_on_cpu import assemble, child_environment, unavailable
from sdxl_trt.engines.bundle.bundle import Bundle, read_bundle
from sdxl_trt.engines.bundle.digests import verify_file
from sdxl_trt.engines.bundle.profile import fixed
from sdxl_trt.engines.plans.files import start_reading
from sdxl_trt.export.cli.export import main

pytestmark = [pytest.mark.slow, pytest.mark.builds, pytest.mark.xdist_group("one bundle")]
RTX = ("--engine", "tensorrt-rtx", "--json")
FEW = ("--components", "unet,vae_decoder")
Told = tuple[int, dict[str, Any], str]
Commands = Callable[..., list[Told]]
# Several command lines in one process: imports take most of the time.
RUN = """
import contextlib, io, json, sys
from sdxl_trt.export.cli import main
told = []
for arguments in json.loads(sys.argv[1]):
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            code = main(arguments)
        except SystemExit as exc:  # argparse's own errors
            code = exc.code
    told.append((code, json.loads(out.getvalue() or "{}"), errors.getvalue()))
json.dump(told, sys.stdout)
"""


@pytest.fixture(scope="module")
def commands() -> Commands:
    """Return a function that runs export-engines in a process that can import `tensorrt_rtx`, once per argument.

    It returns the exit code, the JSON output and the stderr of each run.
    """
    reason = unavailable()
    if reason:
        pytest.skip(f"no TensorRT builder: {reason}")
    environment = child_environment(assemble())

    def run(*lines: tuple[str | Path, ...]) -> list[Told]:
        given = json.dumps([list(map(str, line)) for line in lines])
        done = subprocess.run(
            [sys.executable, "-c", RUN, given], capture_output=True, text=True, check=False, env=environment
        )
        assert done.returncode == 0, done.stderr
        return [(code, written, errors) for code, written, errors in json.loads(done.stdout)]

    return run


@pytest.fixture(scope="module")
def planned(commands: Commands, pairs: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small bundle with plans of UNet and decoder; tests share it and must not change it."""
    root = Path(shutil.copytree(pairs("outline").bundle, tmp_path_factory.mktemp("planned") / "bundle"))
    [(code, told, errors)] = commands((*RTX, *FEW, "--out", root))
    assert code == 0, errors
    assert {plan["component"] for plan in told["plans"]} == {"unet", "unet_shallow", "vae_decoder"}
    return root


@pytest.fixture
def copied(planned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(planned, tmp_path / "bundle"))


def _plans(root: Path) -> dict[str, Any]:
    return {record.key.component: record for record in read_bundle(root, partial=True).manifest.plans}


def test_plans_are_in_the_manifest_with_their_whole_key(planned: Path) -> None:
    bundle = read_bundle(planned)
    for name, record in _plans(planned).items():
        component = bundle.manifest.components[name]
        assert (record.key.graph, record.key.weights) == (component.graph.sha256, component.weights.sha256)
        assert record.key.environment.flavour == "tensorrt-rtx"
        assert record.key.environment.gpu == "any"
        assert len(start_reading(bundle, record).whole()) == record.file.size > component.used_bytes * 0.5
        each = record.memory.profile_activations
        assert len(each) == len(record.key.profiles)
        assert max(each) == record.memory.activations > 0
        assert (planned / record.log).stat().st_size > 0
    assert {path.name for path in (planned / "plans").iterdir()} == {
        Path(file).name for record in _plans(planned).values() for file in (record.file.file, record.log)
    }


def test_plans_that_fit_are_kept_and_others_rebuilt(commands: Commands, copied: Path) -> None:
    before = _plans(copied)
    stamps = {path: path.stat().st_mtime_ns for path in (copied / "plans").glob("*.plan")}
    line = (*RTX, *FEW, "--out", copied)
    (same, *_), (code, told, _) = commands(line, (*line, "--batch", "2", "--dry-run"))
    assert {path: path.stat().st_mtime_ns for path in (copied / "plans").glob("*.plan")} == stamps
    assert (same, code) == (0, 0)
    assert [(job["component"], job["action"], job["reasons"]) for job in told["plans"]] == [
        ("unet", "build", ["other sizes are requested"]), ("unet_shallow", "build", ["other sizes are requested"]),
        ("vae_decoder", "keep", []),
    ]  # fmt: skip
    damaged = copied / before["vae_decoder"].file.file
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff\xff")
    [(code, _, errors)] = commands((*line, "--batch", "2", "--static"))
    assert code == 0, errors
    after = _plans(copied)
    assert [len(record.key.profiles) for record in (after["unet"], after["vae_decoder"])] == [2, 1]
    assert not (copied / before["unet"].file.file).exists()
    bundle = read_bundle(copied)
    for record in after.values():
        verify_file(bundle.path(record.file), record.file)
    assert after["unet"].key.profiles[1].shapes["sample"][2][0] == fixed(4).max


def test_an_unchanged_export_keeps_the_plans(copied: Path, pairs: Callable[[str], Any]) -> None:
    from sdxl_trt.export import Options, export_bundle

    pair, before = pairs("outline"), _plans(copied)
    export_bundle(pair.base, pair.refiner, copied, Options(precision="fp32"))
    assert _plans(copied) == before


def test_a_plan_of_a_changed_graph_is_dropped(copied: Path, tmp_path: Path) -> None:
    import msgspec

    from sdxl_trt.export.output.reuse import take_over_plans

    bundle, before = read_bundle(copied), _plans(copied)
    components = dict(bundle.manifest.components)
    graph = msgspec.structs.replace(components["vae_decoder"].graph, sha256="0" * 64)
    components["vae_decoder"] = msgspec.structs.replace(components["vae_decoder"], graph=graph)
    folder = tmp_path / "new"
    folder.mkdir()
    kept = (before["unet"], before["unet_shallow"])
    assert take_over_plans(bundle, components, folder) == kept
    assert {path.name for path in (folder / "plans").glob("*.plan")} == {Path(one.file.file).name for one in kept}
    # Other users must not be able to write into the folder, whatever the umask.
    assert (folder / "plans").stat().st_mode & 0o022 == 0


def test_plans_only_removes_graphs_and_weights(planned: Path, tmp_path: Path) -> None:
    import msgspec

    from sdxl_trt.engines.build.bundle_plans import drop_onnx
    from sdxl_trt.engines.bundle.bundle import write_manifest
    from sdxl_trt.engines.bundle.tensor_table import read_table
    from sdxl_trt.engines.plans.lookup import planned_components

    root = Path(shutil.copytree(planned, tmp_path / "bundle"))
    bundle = read_bundle(root)
    # The plans' contents do not matter here, only that every component has one.
    some = bundle.manifest.plans[0]
    memory = msgspec.structs.replace(some.memory, profile_activations=())
    records = tuple(
        msgspec.structs.replace(some, memory=memory, key=msgspec.structs.replace(
            some.key, component=name, profiles=_any_profile(bundle, name)))
        for name in planned_components(bundle.manifest)
    )  # fmt: skip
    write_manifest(root, msgspec.structs.replace(bundle.manifest, plans=records))
    left = drop_onnx(read_bundle(root))
    assert read_bundle(root).manifest == left.manifest
    assert not left.manifest.onnx
    assert list(root.glob("**/*.onnx")) == []
    assert read_table(left, "unet") == read_table(bundle, "unet")  # a plan with adapter slots needs it
    assert sum(path.stat().st_size for path in root.rglob("*") if path.is_file() and path.suffix != ".plan") < 1 << 20


def _any_profile(bundle: Bundle, name: str) -> Any:
    from sdxl_trt.engines.plans.sizes import profiles_of, stage_sizes

    return profiles_of(bundle.manifest.components[name], stage_sizes(bundle.manifest), bundle.manifest.base.vae.factor)


REFUSED = [
    (("--height", "100"), "multiples of"),
    (("--width", "64:32:128"), "MIN:OPT:MAX"),
    (("--tokens", "78"), "77"),
    (("--components", "unet,brain"), "brain"),
    ((*FEW, "--plans-only"), "text_encoder"),  # it has no plan and would be lost
]


def test_invalid_options_are_refused_before_building(commands: Commands, copied: Path) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in copied.rglob("*"))
    told = commands(*((*RTX, *arguments, "--out", copied) for arguments, _ in REFUSED))
    for (code, _, error), (arguments, said) in zip(told, REFUSED, strict=True):
        assert (code, error.count("\n")) == (2, 1), (arguments, error)
        assert said in error
    assert sorted((path, path.stat().st_mtime_ns) for path in copied.rglob("*")) == before


def test_without_tensorrt_the_remedy_is_named(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RTX, "--out", str(copied)]) == 3
    assert "pip install" in capsys.readouterr().err


def test_build_options_need_an_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--static", "--out", str(tmp_path / "new")]) == 2
    assert "--engine" in capsys.readouterr().err
