"""Plan keys, the choice of a plan, and reading one: every part of a key counts, and every plan's digest is checked."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sdxl_trt.engines.bundle.bundle import Bundle, read_bundle, write_manifest
from sdxl_trt.engines.bundle.plan_record import ANY, BuildFlags, Environment, PlanKey, PlanMemory, PlanRecord
from sdxl_trt.engines.bundle.profile import Profile, Range, fixed
from sdxl_trt.engines.bundle.records import FileRecord
from sdxl_trt.engines.errors import CorruptError, IncompatibleError, SdxlTrtError, SizeError
from sdxl_trt.engines.plans.files import plan_path, start_reading
from sdxl_trt.engines.plans.limits import PlanLimits, plan_limits
from sdxl_trt.engines.plans.lookup import find_plan, has_plans, plan_notes, planned_components, why_rebuild
from sdxl_trt.engines.plans.sizes import Sizes, profiles_of, stage_sizes

HERE = Environment(flavour="tensorrt", tensorrt="11.4.0.106", gpu="NVIDIA H100", compute_capability="9.0",
                   driver="580.1", platform="linux-x86_64")  # fmt: skip
RTX = Environment(flavour="tensorrt-rtx", tensorrt="1.7.1.4", gpu=ANY, compute_capability=ANY, driver=ANY,
                  platform="linux-x86_64")  # fmt: skip
PLAN = b"a plan is code"


def _replace(record: Any, **changes: Any) -> Any:
    return msgspec.structs.replace(record, **changes)


def _key(bundle: Bundle, name: str = "unet", environment: Environment = HERE, **changes: Any) -> PlanKey:
    component = bundle.manifest.components[name]
    profiles = profiles_of(component, stage_sizes(bundle.manifest), bundle.manifest.base.vae.factor)
    key = PlanKey(component=name, graph=component.graph.sha256, weights=component.weights.sha256,
                  environment=environment, profiles=profiles, flags=BuildFlags())  # fmt: skip
    return _replace(key, **changes)


def _record(key: PlanKey, content: bytes = PLAN) -> PlanRecord:
    file = FileRecord(file=plan_path(key), size=len(content), sha256=hashlib.sha256(content).hexdigest())
    return PlanRecord(key=key, file=file, memory=PlanMemory(weights=1, activations=2), seconds=3.0)


def _with(bundle: Bundle, *records: PlanRecord) -> Bundle:
    return Bundle(bundle.root, _replace(bundle.manifest, plans=records))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """Return the embedded bundle's manifest in an empty folder."""
    from sdxl_trt.mini.embedded import bundle_path

    return Bundle(tmp_path, read_bundle(bundle_path()).manifest)


@pytest.fixture
def planned(bundle: Bundle) -> tuple[Bundle, PlanRecord]:
    """Return a bundle with one plan on disk."""
    record = _record(_key(bundle))
    planned = _with(bundle, record)
    path = bundle.root / record.file.file
    path.parent.mkdir()
    path.write_bytes(PLAN)
    write_manifest(bundle.root, planned.manifest)
    return planned, record


def _longer(profile: Profile) -> Profile:
    return Profile(shapes=profile.shapes | {"timestep": ((1,), (1,), (9,))})


FLAGS = {"opt_level": 5, "workspace": 1, "weight_streaming": True, "version_compatible": True,
         "hardware_compatible": True, "same_compute_capability": True}  # fmt: skip
CHANGES: dict[str, Callable[[PlanKey], PlanKey]] = {
    "component": lambda key: _replace(key, component="refiner_unet"),
    "graph": lambda key: _replace(key, graph="0" * 64),
    "weights": lambda key: _replace(key, weights="0" * 64),
    **{
        name: lambda key, name=name: _replace(key, environment=_replace(key.environment, **{name: "other"}))
        for name in ("tensorrt", "gpu", "compute_capability", "driver", "platform")
    },
    "flavour": lambda key: _replace(key, environment=_replace(key.environment, flavour="tensorrt-rtx")),
    "profiles": lambda key: _replace(key, profiles=(*key.profiles, Profile(shapes={"sample": ((1,), (1,), (1,))}))),
    "lora_rank": lambda key: _replace(key, lora_rank=64),
    "one size": lambda key: _replace(key, profiles=(_longer(key.profiles[0]),)),
    **{
        name: lambda key, name=name, value=value: _replace(key, flags=_replace(key.flags, **{name: value}))
        for name, value in FLAGS.items()
    },
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_part_of_a_key_changes_it(bundle: Bundle, change: Callable[[PlanKey], PlanKey]) -> None:
    key = _key(bundle)
    changed = change(key)
    assert changed.digest() != key.digest()
    assert plan_path(changed) != plan_path(key)
    assert _key(bundle).digest() == key.digest()


def test_the_changes_cover_every_field_of_a_key() -> None:
    fields = {field for record in (PlanKey, Environment, BuildFlags) for field in record.__struct_fields__}
    assert fields - {"environment", "flags"} == CHANGES.keys() - {"one size"}


def test_the_keys_of_plans_without_slots_are_those_of_older_versions(bundle: Bundle) -> None:
    key = _key(bundle)
    assert b"lora_rank" not in msgspec.json.encode(key), "plans of older versions would be stale"
    assert key.lora_rank == 0


def _slotted(bundle: Bundle) -> Bundle:
    """Return the bundle with a slot graph of the UNet."""
    graph = FileRecord(file="unet/adapters.onnx", size=1, sha256="e" * 64)
    parts = bundle.manifest.components
    parts = parts | {"unet": _replace(parts["unet"], slot_graph=graph)}
    return Bundle(bundle.root, _replace(bundle.manifest, components=parts))


def test_a_plan_for_loras_is_found_only_for_loras(bundle: Bundle) -> None:
    slotted = _slotted(bundle)
    plain = _record(_key(slotted))
    slots = _record(_key(slotted, graph="e" * 64, lora_rank=64))
    both = _with(slotted, plain, slots)
    assert find_plan(both, "unet", HERE) is plain
    assert find_plan(both, "unet", HERE, 96) is slots, "the caller compares the ranks"
    with pytest.raises(IncompatibleError, match=r"has no tensorrt plan of unet; build it with: .*tensorrt --out"):
        find_plan(_with(slotted, slots), "unet", HERE)
    with pytest.raises(
        IncompatibleError, match=r"no tensorrt plan for LoRAs of unet; .*tensorrt --lora-rank 128 --out"
    ):
        find_plan(_with(slotted, plain), "unet", HERE, 96)
    elsewhere = _replace(HERE, tensorrt="11.5.0.1")
    with pytest.raises(IncompatibleError, match=r"plan for LoRAs of unet does not fit: .* --lora-rank 64 --out"):
        find_plan(both, "unet", elsewhere, 16)


STALE: dict[str, tuple[Callable[[PlanKey], PlanKey], str]] = {
    "graph": (CHANGES["graph"], "graph was exported again"),
    "weights": (CHANGES["weights"], "built with other weights"),
    "tensorrt": (CHANGES["tensorrt"], "TensorRT is 11.4.0.106, the plan was built with other"),
    "gpu": (CHANGES["gpu"], "the GPU is NVIDIA H100, the plan was built for other"),
    "compute_capability": (CHANGES["compute_capability"], "compute capability is 9.0"),
    "platform": (CHANGES["platform"], "platform is linux-x86_64"),
}


@pytest.mark.parametrize(("change", "reason"), STALE.values(), ids=STALE)
def test_a_stale_plan_is_refused_with_the_difference_and_the_command(
    bundle: Bundle, change: Callable[[PlanKey], PlanKey], reason: str
) -> None:
    stale = _with(bundle, _record(change(_key(bundle))))
    with pytest.raises(IncompatibleError, match=reason) as caught:
        find_plan(stale, "unet", HERE)
    assert f"export-engines --engine tensorrt --out {bundle.root}" in str(caught.value)


def test_the_matching_plan_is_found_among_others(bundle: Bundle) -> None:
    fits = _record(_key(bundle))
    others = [_record(CHANGES[name](fits.key)) for name in ("gpu", "tensorrt", "flavour", "component")]
    assert find_plan(_with(bundle, *others, fits), "unet", HERE) is fits
    assert has_plans(_with(bundle, fits), "tensorrt")
    assert not has_plans(_with(bundle, fits), "tensorrt-rtx")


def test_without_a_plan_the_error_names_the_command(bundle: Bundle) -> None:
    with pytest.raises(IncompatibleError, match="has no tensorrt plan of unet; build it with: export-engines"):
        find_plan(bundle, "unet", HERE)


def test_profiles_and_flags_are_compared_only_on_request(bundle: Bundle) -> None:
    record, component = _record(_key(bundle)), bundle.manifest.components["unet"]
    assert why_rebuild(record, component, HERE) == []
    assert why_rebuild(record, component, HERE, (record.key.profiles, record.key.flags, 0)) == []
    assert "other sizes" in why_rebuild(record, component, HERE, ((), record.key.flags, 0))[0]
    assert (
        "other build options"
        in why_rebuild(record, component, HERE, (record.key.profiles, BuildFlags(opt_level=5), 0))[0]
    )


def test_a_plan_of_the_range_alone_still_runs_and_a_build_says_what_it_lacks(bundle: Bundle) -> None:
    key = _key(bundle)
    old, component = _record(_replace(key, profiles=key.profiles[-1:])), bundle.manifest.components["unet"]
    assert len(key.profiles) == 3
    assert find_plan(_with(bundle, old), "unet", HERE) is old
    assert why_rebuild(old, component, HERE, (key.profiles, key.flags, 0)) == [
        "it lacks profiles for some of the requested sizes"
    ]
    assert plan_limits(bundle, [old]) == plan_limits(bundle, [_record(key)])


@pytest.mark.parametrize(
    ("built", "here", "fits"),
    [("11.2.0.1", "11.4.0.106", True), ("11.5.0.1", "11.4.0.106", False), ("12.0.0.1", "11.4.0.106", False),
     ("10.9.0.1", "11.4.0.106", False), ("11.4.0.106", "11.4.0.106", True)],
)  # fmt: skip
def test_version_compatible_plans_run_on_later_minors(bundle: Bundle, built: str, here: str, fits: bool) -> None:
    key = _key(bundle, environment=_replace(HERE, tensorrt=built), flags=BuildFlags(version_compatible=True))
    reasons = why_rebuild(_record(key), bundle.manifest.components["unet"], _replace(HERE, tensorrt=here))
    assert (reasons == []) is fits


@pytest.mark.parametrize("flags", [{"hardware_compatible": True}, {"same_compute_capability": True}])
def test_a_plan_of_this_gpu_is_used_before_one_of_another(bundle: Bundle, flags: dict[str, bool]) -> None:
    """Else a plan that was built here, because the other one failed or is slow, would never run."""
    elsewhere = [_replace(HERE, gpu=gpu) for gpu in ("NVIDIA H200", "NVIDIA GH200")]
    others = [_record(_key(bundle, environment=each, flags=BuildFlags(**flags))) for each in elsewhere]
    ours = _record(_key(bundle))
    for records in ((*others, ours), (ours, *others)):
        assert find_plan(_with(bundle, *records), "unet", HERE) is ours
    assert find_plan(_with(bundle, *others), "unet", HERE) is others[-1]


def test_hardware_compatible_plans_need_ampere_or_later(bundle: Bundle) -> None:
    record = _record(_key(bundle, flags=BuildFlags(hardware_compatible=True)))
    component = bundle.manifest.components["unet"]
    assert why_rebuild(record, component, _replace(HERE, gpu="NVIDIA A10", compute_capability="8.6")) == []
    assert "needs 8.0" in why_rebuild(record, component, _replace(HERE, compute_capability="7.5"))[0]


@pytest.mark.parametrize(
    ("gpu", "capability", "reasons"),
    [
        ("NVIDIA H100", "9.0", []),
        ("NVIDIA H200", "9.0", []),
        ("NVIDIA A100", "8.0", ["the compute capability is 8.0, the plan was built for 9.0"]),
        ("NVIDIA B200", "10.0", ["the compute capability is 10.0, the plan was built for 9.0"]),
    ],
)
def test_plans_for_one_compute_capability_run_on_its_gpus(
    bundle: Bundle, gpu: str, capability: str, reasons: list[str]
) -> None:
    record = _record(_key(bundle, flags=BuildFlags(same_compute_capability=True)))
    here = _replace(HERE, gpu=gpu, compute_capability=capability)
    assert why_rebuild(record, bundle.manifest.components["unet"], here) == reasons
    assert plan_notes(record, here) == []


@pytest.mark.parametrize("capability", ["8.0", "8.6", "10.0", "12.0"])
def test_a_plan_for_ampere_is_noted_on_another_compute_capability(bundle: Bundle, capability: str) -> None:
    record = _record(_key(bundle, flags=BuildFlags(hardware_compatible=True)))
    here = _replace(HERE, gpu="other", compute_capability=capability)
    assert find_plan(_with(bundle, record), "unet", here) is record
    (note,) = plan_notes(record, here)
    assert note == f"built for every GPU since Ampere on compute capability 9.0, here is {capability}"
    assert plan_notes(record, HERE) == []


@pytest.mark.parametrize("old", [True, False], ids=["in the key, as older versions wrote it", "in the record"])
def test_another_driver_is_noted_and_no_reason_to_rebuild(bundle: Bundle, old: bool) -> None:
    key = _key(bundle)
    record = _record(key if old else _replace(key, environment=_replace(HERE, driver=ANY)))
    record = record if old else _replace(record, driver="580.1")
    newer = _replace(HERE, driver="590.2")
    assert find_plan(_with(bundle, record), "unet", newer) is record
    assert plan_notes(record, newer) == ["built with NVIDIA driver 580.1, here is 590.2"]
    assert plan_notes(record, HERE) == plan_notes(record, RTX) == []
    assert plan_notes(_record(_key(bundle, environment=RTX)), newer) == []


def _with_twins(bundle: Bundle) -> Bundle:
    """Return the bundle with bf16 twins of its autoencoder, in the manifest only."""
    manifest, parts = bundle.manifest, dict(bundle.manifest.components)
    for name in ("vae_decoder", "vae_encoder"):
        parts[f"{name}_bf16"] = _replace(parts[name], precision="bf16")
        parts[name] = _replace(parts[name], precision="fp32")
    vae = _replace(manifest.base.vae, decoder_bf16="vae_decoder_bf16", encoder_bf16="vae_encoder_bf16")
    stages = {name: _replace(stage, vae=vae) for name, stage in manifest.stages().items()}
    return Bundle(bundle.root, _replace(manifest, components=parts, **stages))


@pytest.mark.parametrize(("capability", "twin"), [(None, True), (ANY, True), ("8.0", True), ("12.0", True),
                                                  ("7.5", False), ("7.0", False)])  # fmt: skip
def test_a_gpu_without_bf16_gets_no_plan_of_a_twin(bundle: Bundle, capability: str | None, twin: bool) -> None:
    names = planned_components(_with_twins(bundle).manifest, capability)
    assert set(names) >= {"unet", "refiner_unet", "text_encoder"}
    for name in ("vae_decoder", "vae_encoder"):
        assert [each for each in names if each.startswith(name)] == [f"{name}_bf16" if twin else name]


def test_an_rtx_plan_runs_on_every_gpu(bundle: Bundle) -> None:
    record = _record(_key(bundle, environment=RTX))
    assert why_rebuild(record, bundle.manifest.components["unet"], RTX) == []


def test_a_plan_is_read_once_and_unchanged(planned: tuple[Bundle, PlanRecord]) -> None:
    assert bytes(start_reading(*planned).whole()) == PLAN


@pytest.mark.parametrize("content", [PLAN[:-1], PLAN + b"x", PLAN.replace(b"code", b"c0de"), b""])
def test_a_changed_plan_is_refused(planned: tuple[Bundle, PlanRecord], content: bytes) -> None:
    bundle, record = planned
    bundle.path(record.file).write_bytes(content)
    with pytest.raises(CorruptError, match="build it again with: export-engines"):
        start_reading(bundle, record).whole()


@pytest.mark.parametrize("bit", [0o020, 0o002])
@pytest.mark.parametrize("place", ["", "manifest.json", "plans", "file"])
def test_a_plan_that_others_can_write_is_refused(planned: tuple[Bundle, PlanRecord], place: str, bit: int) -> None:
    bundle, record = planned
    path = bundle.path(record.file) if place == "file" else bundle.root / place
    path.chmod(path.stat().st_mode | bit)
    with pytest.raises(CorruptError, match="other users can write it"):
        start_reading(bundle, record).whole()


def test_a_plan_of_another_user_is_refused(planned: tuple[Bundle, PlanRecord], monkeypatch: Any) -> None:
    monkeypatch.setattr("os.getuid", lambda: 4711)
    owner = planned[0].path(planned[1].file).stat().st_uid
    if owner == 0:
        assert bytes(start_reading(*planned).whole()) == PLAN  # root is trusted
    else:
        with pytest.raises(CorruptError, match="belongs to another user"):
            start_reading(*planned).whole()


def test_a_missing_plan_is_an_error(planned: tuple[Bundle, PlanRecord]) -> None:
    planned[0].path(planned[1].file).unlink()
    with pytest.raises(SdxlTrtError, match="reading"):
        start_reading(*planned).whole()


def test_a_plan_outside_the_bundle_is_refused(bundle: Bundle) -> None:
    record = _record(_key(bundle))
    record = _replace(record, file=_replace(record.file, file="../evil.plan"))
    with pytest.raises(CorruptError, match="plain path"):
        start_reading(bundle, record).whole()


@pytest.mark.parametrize("damage", ["component", "profiles", "one size"])
def test_a_manifest_with_a_plan_of_another_graph_is_corrupt(bundle: Bundle, damage: str) -> None:
    key = CHANGES[damage](_key(bundle))
    key = _replace(key, profiles=()) if damage == "one size" else key
    key = _replace(key, component="nothing") if damage == "component" else key
    write_manifest(bundle.root, _with(bundle, _record(key)).manifest)
    with pytest.raises(CorruptError, match="a plan of"):
        read_bundle(bundle.root, files=False)


def test_limits_are_the_sizes_that_both_stages_accept(bundle: Bundle) -> None:
    def record(name: str, sizes: Sizes) -> PlanRecord:
        component = bundle.manifest.components[name]
        return _record(_key(bundle, name, profiles=profiles_of(component, sizes, 8)))

    def sizes(height: Range, batch: int) -> Sizes:
        return Sizes(height=height, width=fixed(128), batch=Range(min=1, opt=1, max=batch), tokens=fixed(77))

    base = record("unet", sizes(Range(min=64, opt=128, max=256), 4))
    refiner = record("refiner_unet", sizes(Range(min=128, opt=192, max=512), 2))
    limits = plan_limits(bundle, [base, refiner])
    assert limits is not None
    assert (limits.height, limits.width) == (Range(min=128, opt=128, max=256), fixed(128))
    assert limits.pictures == 2
    limits.check(128, 256)
    with pytest.raises(SizeError, match="--height 320: the plans were built for 128 to 256; try 256"):
        limits.check(128, 320)
    apart = record("refiner_unet", sizes(fixed(512), 1))
    with pytest.raises(IncompatibleError, match="no size in common"):
        plan_limits(bundle, [base, apart])
    assert plan_limits(bundle, []) is None


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
def test_the_error_of_limits_names_the_flavour(bundle: Bundle, flavour: Any) -> None:
    limits = plan_limits(bundle, [_record(_key(bundle, environment=_replace(HERE, flavour=flavour)))])
    assert limits is not None
    with pytest.raises(SizeError, match=f"export-engines --engine {flavour} --width"):
        limits.check(64 * 999, 64 * 999)


def test_static_limits_hold_both_row_counts(bundle: Bundle) -> None:
    sizes = Sizes(height=fixed(128), width=fixed(128), batch=fixed(3), tokens=fixed(77), static=True)
    component = bundle.manifest.components["unet"]
    limits = plan_limits(bundle, [_record(_key(bundle, profiles=profiles_of(component, sizes, 8)))])
    assert limits == PlanLimits(height=fixed(128), width=fixed(128), pictures=3, tokens=fixed(77), fewest=3)


@pytest.mark.parametrize(
    ("flavour", "platform", "fits"),
    [
        ("tensorrt-rtx", "linux-x86_64", True), ("tensorrt-rtx", "win32-AMD64", True),
        ("tensorrt-rtx", "linux-aarch64", False), ("tensorrt-rtx", "win32-ARM64", False),
        ("tensorrt", "linux-x86_64", True), ("tensorrt", "win32-AMD64", False),
    ],
)  # fmt: skip
def test_plans_of_tensorrt_for_rtx_alone_run_on_the_other_system(
    bundle: Bundle, flavour: str, platform: str, *, fits: bool
) -> None:
    built = RTX if flavour == "tensorrt-rtx" else HERE
    reasons = why_rebuild(
        _record(_key(bundle, environment=built)),
        bundle.manifest.components["unet"],
        _replace(built, platform=platform),
    )
    assert reasons == ([] if fits else [f"the platform is {platform}, the plan was built on linux-x86_64"])
