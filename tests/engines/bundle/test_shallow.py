"""Shallow UNets in manifests, phases and memory plans: only cached runs use them, and a wrong one is refused."""

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sdxl_trt.engines.bundle import Bundle, Workload, read_bundle, run_phases, write_manifest
from sdxl_trt.engines.errors import CorruptError, IncompatibleError
from sdxl_trt.engines.plans.sizes import stage_sizes
from sdxl_trt.engines.residency import open_pool
from sdxl_trt.engines.residency.policy import estimate_memory
from sdxl_trt.mini.embedded import bundle_path

EMBEDDED = read_bundle(bundle_path())
CACHED = Workload(cached=("base", "refiner"))
PROVIDERS = ("ort-cpu", "ort-cuda", "tensorrt")


def _older(manifest: Any) -> Any:
    """Return a manifest as versions without shallow UNets wrote it."""
    parts = {name: part for name, part in manifest.components.items() if part.kind != "shallow_unet"}
    stages = {name: msgspec.structs.replace(stage, shallow=None) for name, stage in manifest.stages().items()}
    return msgspec.structs.replace(manifest, components=parts, **stages)


def test_only_cached_runs_use_shallow_unets() -> None:
    phases = run_phases(EMBEDDED.manifest, "tensorrt", CACHED)
    assert (phases["base"], phases["refiner"]) == (("unet", "unet_shallow"), ("refiner_unet", "refiner_unet_shallow"))
    plain = run_phases(EMBEDDED.manifest, "tensorrt")
    assert (plain["base"], plain["refiner"]) == (("unet",), ("refiner_unet",))
    assert plain.items() - phases.items() == {("base", ("unet",)), ("refiner", ("refiner_unet",))}


def test_an_older_bundle_is_refused_where_it_is_opened_for_cached_runs() -> None:
    older = Bundle(EMBEDDED.root, _older(EMBEDDED.manifest))
    with open_pool(older, "ort-cpu", once=True):
        pass
    for call in (
        lambda: open_pool(older, "ort-cpu", workload=CACHED),
        lambda: estimate_memory(older, provider="tensorrt", capacity=None, workload=CACHED),
    ):
        with pytest.raises(IncompatibleError, match=r"exported without shallow UNets \(unet, refiner_unet.*again"):
            call()


@pytest.mark.parametrize(
    ("bare", "cached", "says"),
    [
        ("refiner", ("base",), None),
        ("base", ("refiner",), None),
        (
            "refiner",
            ("base", "refiner"),
            r"^the refiner's UNet .* --refiner-cache 1 leaves the refiner out",
        ),
        ("base", ("base", "refiner"), r"^the base's UNet .* --cache 1 leaves the base out"),
    ],
)
def test_a_stage_without_a_shallow_unet_may_be_left_out(bare: str, cached: tuple[str, ...], says: str | None) -> None:
    stage = EMBEDDED.manifest.stages()[bare]
    half = msgspec.structs.replace(EMBEDDED.manifest, **{bare: msgspec.structs.replace(stage, shallow=None)})
    if says is not None:
        with pytest.raises(IncompatibleError, match=says):
            open_pool(Bundle(EMBEDDED.root, half), "ort-cpu", workload=Workload(cached=cached))
        return
    phases = run_phases(half, "ort-cpu", Workload(cached=cached))
    assert [name for name, used in phases.items() if any("shallow" in each for each in used)] == [*cached]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_shallow_unet_counts_with_what_it_uses(provider: str) -> None:
    sizes = stage_sizes(EMBEDDED.manifest)
    options: Any = {"provider": provider, "capacity": None, "residency": "swap", "sizes": sizes}
    plain, cached = (estimate_memory(EMBEDDED, **options, workload=one) for one in (Workload(), CACHED))
    needs = {need.component: need for need in cached.needs}
    assert needs.keys() - {need.component for need in plain.needs} == {"unet_shallow", "refiner_unet_shallow"}
    full, shallow = needs["unet"], needs["unet_shallow"]
    assert 0 < shallow.weights < full.weights / 10
    assert 0 < shallow.activations <= full.activations
    assert shallow.streamable == 0
    (deep,) = (spec for spec in EMBEDDED.manifest.components["unet"].outputs if spec.name == "deep_feature")
    side = sizes.height.opt // EMBEDDED.manifest.base.vae.factor
    assert shallow.io >= 2 * (2 * int(deep.shape[1]) * side**2 * 2), "both buffers of what is kept"
    base = next(phase for phase in cached.phases if phase.name == "base")
    assert set(base.loaded) == {"unet", "unet_shallow"}, "loaded together"
    assert cached.peak > plain.peak


def test_the_files_of_a_bundle_are_counted_once() -> None:
    manifest = EMBEDDED.manifest
    listed = [record.file for name in manifest.components for record in manifest.own_files(name)]
    assert sorted(listed) == sorted(record.file for record in manifest.files)
    assert len(set(listed)) == len(listed)
    parts = [path.relative_to(EMBEDDED.root).as_posix() for name in manifest.components
             if (EMBEDDED.root / name).is_dir() for path in (EMBEDDED.root / name).iterdir()]  # fmt: skip
    assert sorted(parts) == sorted(listed), "a file that no component has, or a missing one"


def _replaced(part: str, **changes: Any) -> Any:
    parts = EMBEDDED.manifest.components
    return msgspec.structs.replace(
        EMBEDDED.manifest, components={**parts, part: msgspec.structs.replace(parts[part], **changes)}
    )


SHALLOW = EMBEDDED.manifest.components["unet_shallow"]


@pytest.mark.parametrize(
    ("manifest", "told"),
    [
        (
            msgspec.structs.replace(
                EMBEDDED.manifest, base=msgspec.structs.replace(EMBEDDED.manifest.base, shallow="unet")
            ),
            "base needs a shallow_unet called 'unet'",
        ),
        (_replaced("unet_shallow", weights=EMBEDDED.manifest.components["refiner_unet"].weights), "does not continue"),
        (_replaced("unet", outputs=EMBEDDED.manifest.components["unet"].outputs[:1]), "does not continue 'unet'"),
        (
            _replaced("unet_shallow", inputs=tuple(
                msgspec.structs.replace(spec, dtype="float32") if spec.name == "deep_old" else spec
                for spec in SHALLOW.inputs)),
            "does not continue 'unet'",
        ),
        (
            _replaced("unet_shallow", inputs=tuple(
                msgspec.structs.replace(spec, shape=("rows", 7)) if spec.name == "time_ids" else spec
                for spec in SHALLOW.inputs)),
            "with other inputs than 'unet'",
        ),
        (_replaced("unet_shallow", inputs=SHALLOW.inputs[:-1]), "is not a shallow_unet"),
    ],
)  # fmt: skip
def test_a_shallow_unet_that_does_not_fit_its_unet_is_refused(manifest: Any, told: str, tmp_path: Path) -> None:
    root = tmp_path / "bundle"
    shutil.copytree(EMBEDDED.root, root, copy_function=lambda source, target: Path(target).symlink_to(source))
    (root / "manifest.json").unlink()
    write_manifest(root, manifest)
    with pytest.raises(CorruptError, match=told):
        read_bundle(root)


def test_a_controlnet_must_reach_the_outermost_level(controlled: Path, tmp_path: Path) -> None:
    manifest = read_bundle(controlled).manifest
    shallow = manifest.components["unet_shallow"]
    bare = msgspec.structs.replace(shallow, inputs=tuple(spec for spec in shallow.inputs if not spec.optional))
    assert bare != shallow
    write_manifest(tmp_path, msgspec.structs.replace(manifest, components={**manifest.components,
                                                                           "unet_shallow": bare}))  # fmt: skip
    with pytest.raises(CorruptError, match="with other inputs than 'unet'"):
        read_bundle(tmp_path, files=False)
