"""trt-generate --plan with built plans: the profiles of the usual size, of the range, and of a size asked for."""

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sdxl_trt.engines.bundle.bundle import read_bundle, write_manifest
from sdxl_trt.engines.bundle.phases import run_components
from sdxl_trt.engines.bundle.plan_record import BuildFlags, Environment, PlanKey, PlanMemory, PlanRecord
from sdxl_trt.engines.bundle.profile import fixed
from sdxl_trt.engines.bundle.records import FileRecord
from sdxl_trt.engines.plans.sizes import profiles_of, stage_sizes
from sdxl_trt.mini.embedded import bundle_path
from sdxl_trt.runtime.cli.generate import main

ELSEWHERE = Environment(
    flavour="tensorrt", tensorrt="11.4", gpu="G", compute_capability="8.9", driver="1", platform="linux-x86_64"
)
MB = 10**6


@pytest.fixture
def planned(tmp_path: Path) -> Path:
    """Return a bundle with plans whose range needs 700 MB, and whose usual size needs 100 MB or 300 with guidance."""
    return _bundle(tmp_path)


def _bundle(tmp_path: Path, **changes: Any) -> Path:
    root = Path(shutil.copytree(bundle_path(), tmp_path / "bundle"))
    manifest = read_bundle(root).manifest
    sizes = msgspec.structs.replace(stage_sizes(manifest), **changes)
    records = []
    for name in run_components(manifest, "tensorrt"):
        component = manifest.components[name]
        profiles = profiles_of(component, sizes, manifest.base.vae.factor)
        each = (100 * MB, 300 * MB, 700 * MB)[: len(profiles)] if component.kind == "unet" else ()
        memory = PlanMemory(weights=5000 * MB, activations=max(each, default=1), profile_activations=each)
        key = PlanKey(
            component=name, graph=component.graph.sha256, weights=component.weights.sha256, environment=ELSEWHERE,
            profiles=profiles, flags=BuildFlags(),
        )  # fmt: skip
        file = FileRecord(file=f"plans/{name}.plan", size=4, sha256="0" * 64)
        (root / "plans").mkdir(exist_ok=True)
        (root / file.file).write_bytes(b"plan")
        records.append(PlanRecord(key=key, file=file, memory=memory, seconds=1.0))
    write_manifest(root, msgspec.structs.replace(manifest, plans=tuple(records)))
    return root


def _plan(capsys: Any, planned: Path, *more: str, vram: str = "8GB") -> tuple[int, dict[str, Any], str]:
    code = main(["--plan", "--vram", vram, "--engines", str(planned), "--json", *more])
    captured = capsys.readouterr()
    told = json.loads(captured.out) if captured.out else {}
    return code, {need["component"]: need for need in told.get("needs", ())}, captured.err


def test_both_the_usual_size_and_the_largest_are_shown(capsys: Any, planned: Path) -> None:
    code, needs, _ = _plan(capsys, planned)
    assert (code, needs["unet"]["activations"], needs["unet"]["largest"]) == (0, 300 * MB, 700 * MB)
    assert main(["--plan", "--vram", "8GB", "--engines", str(planned)]) == 0
    text = capsys.readouterr().out
    assert "weights  activations   at most  in and out" in text
    (row,) = (line for line in text.splitlines() if line.startswith("unet "))
    assert row.split()[1:7] == ["5.00", "GB", "300", "MB", "700", "MB"]
    assert "at the largest sizes that the plans take, the peak is 5.70 GB" in text


def test_a_size_selects_its_profile(capsys: Any, planned: Path) -> None:
    _, needs, _ = _plan(capsys, planned, "--width", "64")
    assert needs["unet"]["activations"] == 700 * MB
    _, needs, _ = _plan(capsys, planned, "--width", "128", "--height", "128")
    assert needs["unet"]["activations"] == 300 * MB
    # 5.7 GB do not fit into nine tenths of 6 GB; 5.3 do.
    assert [_plan(capsys, planned, *more, vram="6GB")[0] for more in ((), ("--width", "64"))] == [0, 5]


def test_plans_for_several_pictures_at_once_are_planned_as_they_run(capsys: Any, tmp_path: Path) -> None:
    """A run of one picture is padded to the fewest that they take."""
    planned = _bundle(tmp_path, batch=fixed(4), static=True)
    code, needs, error = _plan(capsys, planned, "--width", "128", "--height", "128")
    assert (code, error) == (0, "")
    assert needs["unet"]["activations"] == 300 * MB


def test_a_size_that_the_plans_do_not_take_is_refused(capsys: Any, planned: Path) -> None:
    code, _, error = _plan(capsys, planned, "--width", "256")
    assert (code, error.count("\n")) == (2, 1)
    assert "unet: the plan takes rows 1 to 2" in error


def test_a_run_with_loras_is_planned_with_plans_for_loras(capsys: Any, make_lora: Any, tmp_path: Path) -> None:
    ink = make_lora(tmp_path / "ink.safetensors", "unet")
    root = _bundle(tmp_path)
    manifest = read_bundle(root).manifest
    (plain,) = (record for record in manifest.plans if record.key.component == "unet")
    slotted = msgspec.structs.replace(
        plain,
        key=msgspec.structs.replace(plain.key, lora_rank=16),
        memory=msgspec.structs.replace(plain.memory, weights=5500 * MB),
    )
    lora = ["--lora", str(ink)]
    _, unbuilt, _ = _plan(capsys, root, *lora)
    write_manifest(root, msgspec.structs.replace(manifest, plans=(*manifest.plans, slotted)))
    _, without, _ = _plan(capsys, root)
    _, needs, _ = _plan(capsys, root, *lora)
    assert (without["unet"]["weights"], needs["unet"]["weights"]) == (5000 * MB, 5500 * MB)
    factors = needs["unet"]["io"] - without["unet"]["io"]
    assert factors == needs["unet"]["uncertain"] > 0
    assert {**needs, "unet": None} == {**without, "unet": None}
    # Without a plan for LoRAs, it is estimated for the rank that is suggested: 128.
    assert unbuilt["unet"]["weights"] == manifest.components["unet"].weights.size
    assert unbuilt["unet"]["io"] - without["unet"]["io"] == 8 * factors
