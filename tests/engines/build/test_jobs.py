"""Which plans are kept and which are built, what is refused before a build, and the warnings of a build."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sdxl_trt.engines.build import bundle_plans
from sdxl_trt.engines.build.bundle_plans import build_plans, drop_onnx
from sdxl_trt.engines.build.jobs import plan_builds
from sdxl_trt.engines.build.messages import BuildJob, BuiltPlan
from sdxl_trt.engines.bundle import Bundle, Chunks, FileRecord, PlanMemory, PlanRecord, read_bundle
from sdxl_trt.engines.bundle.plan_record import ANY, BuildFlags, Environment
from sdxl_trt.engines.errors import IncompatibleError, UsageError
from sdxl_trt.engines.plans.lookup import planned_components
from sdxl_trt.mini.embedded import bundle_path

HERE = Environment(flavour="tensorrt", tensorrt="11.4.0.106", gpu="NVIDIA H100", compute_capability="9.0",
                   driver="580.1", platform="linux-x86_64")  # fmt: skip
TURING = msgspec.structs.replace(HERE, gpu="NVIDIA T4", compute_capability="7.5")
RTX = msgspec.structs.replace(HERE, flavour="tensorrt-rtx", gpu=ANY, compute_capability=ANY, driver=ANY)
PLAN = b"plan"
EMBEDDED = read_bundle(bundle_path())


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """Return the embedded bundle's manifest in a folder without its files."""
    (tmp_path / "plans").mkdir()
    return Bundle(tmp_path, EMBEDDED.manifest)


def _built(bundle: Bundle, environment: Environment, flags: BuildFlags | None = None) -> Bundle:
    """Return the bundle with a plan of each component, as if built in `environment`."""
    records = []
    for job in plan_builds(bundle, environment, flags=flags):
        file = FileRecord(file=f"plans/{job.component}.plan", size=len(PLAN), sha256=hashlib.sha256(PLAN).hexdigest())
        (bundle.root / file.file).write_bytes(PLAN)
        memory = PlanMemory(weights=1, activations=1)
        records.append(PlanRecord(key=job.key, file=file, memory=memory, seconds=1, driver=environment.driver))
    return Bundle(bundle.root, msgspec.structs.replace(bundle.manifest, plans=tuple(records)))


def _precision(bundle: Bundle, precision: Any, *names: str) -> Bundle:
    parts = dict(bundle.manifest.components)
    parts |= {name: msgspec.structs.replace(parts[name], precision=precision) for name in names}
    return Bundle(bundle.root, msgspec.structs.replace(bundle.manifest, components=parts))


def _with_twin(bundle: Bundle) -> Bundle:
    manifest = _precision(bundle, "fp32", "vae_decoder").manifest
    twin = msgspec.structs.replace(manifest.components["vae_decoder"], precision="bf16")
    vae = msgspec.structs.replace(manifest.base.vae, decoder_bf16="vae_decoder_bf16")
    stages: dict[str, Any] = {
        name: msgspec.structs.replace(stage, vae=vae) for name, stage in manifest.stages().items()
    }
    parts = manifest.components | {"vae_decoder_bf16": twin}
    return Bundle(bundle.root, msgspec.structs.replace(manifest, components=parts, **stages))


def _kept(bundle: Bundle, environment: Environment, flags: BuildFlags | None = None) -> set[bool]:
    return {job.record is not None for job in plan_builds(bundle, environment, flags=flags)}


def test_another_driver_keeps_every_plan(bundle: Bundle) -> None:
    built = _built(bundle, HERE)
    assert {job.key.environment.driver for job in plan_builds(built, HERE)} == {ANY}
    assert _kept(built, msgspec.structs.replace(HERE, driver="590.2")) == {True}
    assert _kept(built, msgspec.structs.replace(HERE, tensorrt="11.5.0.1")) == {False}
    old = [msgspec.structs.replace(each, driver="", key=msgspec.structs.replace(each.key, environment=HERE))
           for each in built.manifest.plans]  # fmt: skip
    older = Bundle(built.root, msgspec.structs.replace(built.manifest, plans=tuple(old)))
    assert _kept(older, msgspec.structs.replace(HERE, driver="590.2")) == {True}
    assert [job.key for job in plan_builds(older, HERE)] == [each.key for each in old], "kept plans keep their keys"


def test_a_plan_for_one_compute_capability_is_kept_on_its_other_gpus(bundle: Bundle) -> None:
    flags = BuildFlags(same_compute_capability=True)
    built = _built(bundle, HERE, flags)
    assert _kept(built, msgspec.structs.replace(HERE, gpu="NVIDIA H200"), flags) == {True}
    assert _kept(built, msgspec.structs.replace(HERE, gpu="A100", compute_capability="8.0"), flags) == {False}
    assert _kept(built, HERE, BuildFlags()) == {False}


def test_a_damaged_plan_is_built_again(bundle: Bundle) -> None:
    built = _built(bundle, HERE)
    (bundle.root / "plans/unet.plan").write_bytes(b"palm")
    assert [job.component for job in plan_builds(built, HERE) if job.record is None] == ["unet"]


def test_turing_gets_plans_of_the_originals(bundle: Bundle) -> None:
    twin = _with_twin(bundle)
    decoders = [
        [job.component for job in plan_builds(twin, where) if job.component.startswith("vae_decoder")]
        for where in (HERE, TURING)
    ]
    assert decoders == [["vae_decoder_bf16"], ["vae_decoder"]]
    (profiles,) = [job.key.profiles for job in plan_builds(twin, TURING) if job.component == "vae_decoder"]
    widest = max(profile.shapes["latent_sample"][2][3] for profile in profiles)
    assert widest * twin.manifest.base.vae.factor <= 512, "fp32 decodes in tiles"


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("unet", "text_encoder"), "text_encoder, unet in bf16, which NVIDIA T4 .compute capability 7.5.*with --fp16"),
        (("vae_decoder",), "vae_decoder in bf16.* export again with --vae-precision fp32"),
    ],
)
def test_bf16_is_refused_on_turing_before_a_build(bundle: Bundle, names: tuple[str, ...], text: str) -> None:
    bf16 = _precision(bundle, "bf16", *names)
    with pytest.raises(IncompatibleError, match=text) as caught:
        plan_builds(bf16, TURING)
    assert "\n" not in str(caught.value)
    assert plan_builds(bf16, HERE)
    assert plan_builds(bf16, RTX), "a plan for any GPU since Ampere"


def test_plans_for_ampere_are_not_built_on_turing(bundle: Bundle) -> None:
    with pytest.raises(IncompatibleError, match=r"NVIDIA T4 has compute capability 7\.5.*--hardware-compatible same"):
        plan_builds(bundle, TURING, flags=BuildFlags(hardware_compatible=True))
    assert plan_builds(bundle, TURING, flags=BuildFlags(same_compute_capability=True))


def test_a_bundle_of_plans_only_needs_the_components_of_its_gpu(bundle: Bundle) -> None:
    built = _built(_with_twin(bundle), TURING)
    (decoder,) = [each for each in built.manifest.plans if each.key.component == "vae_decoder"]
    fewer = tuple(each for each in built.manifest.plans if each is not decoder)
    with pytest.raises(UsageError, match="vae_decoder would be left without a plan"):
        drop_onnx(Bundle(built.root, msgspec.structs.replace(built.manifest, plans=fewer)))
    assert {each.key.component for each in built.manifest.plans} == set(planned_components(built.manifest, "7.5"))


@pytest.fixture
def builds(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> list[BuildJob]:
    """Return the jobs of build_plans, which build nothing and enter a dummy plan."""
    jobs: list[BuildJob] = []

    def build(job: BuildJob, progress: Any = None) -> BuiltPlan:
        jobs.append(job)
        job.plan.write_bytes(PLAN)
        digest = hashlib.sha256(PLAN).hexdigest()
        return BuiltPlan(component=job.component, plan=job.plan, seconds=1.0, peak_anonymous=0, peak_file=0,
                         size=len(PLAN), sha256=digest, weights=1, activations=1, streamable=0, parse_seconds=0.1,
                         layers=1, chunks=Chunks(size=len(PLAN), sha256=(digest,)))  # fmt: skip

    monkeypatch.setattr(bundle_plans, "build_plan", build)
    monkeypatch.setattr(bundle_plans, "verify_file", lambda *_: None)
    monkeypatch.setattr(bundle_plans, "read_bundle", lambda root, partial: bundle)
    return jobs


def _build(bundle: Bundle, environment: Environment, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Bundle:
    monkeypatch.setattr(bundle_plans, "current_environment", lambda _: environment)
    return build_plans(bundle.root, environment.flavour, components=["unet"], **options)


def test_a_timing_cache_is_ignored_for_rtx_and_said_so(
    bundle: Bundle, builds: list[BuildJob], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = bundle.root / "timing.cache"
    _build(bundle, RTX, monkeypatch, timing_cache=cache)
    assert [job.timing_cache for job in builds] == [None]
    (warning,) = caplog.messages
    assert warning == f"--timing-cache {cache}: ignored, since TensorRT for RTX times no kernels while it builds"
    _build(bundle, HERE, monkeypatch, timing_cache=cache)
    assert builds[1].timing_cache == cache
    assert len(caplog.messages) == 1


def test_the_driver_of_a_build_is_recorded_beside_the_key(
    bundle: Bundle, builds: list[BuildJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    (record,) = _build(bundle, HERE, monkeypatch).manifest.plans
    assert (record.driver, record.built_with, record.key.environment.driver) == ("580.1", "580.1", ANY)
    (record,) = _build(bundle, RTX, monkeypatch).manifest.plans
    assert (record.driver, record.built_with) == ("", "")


@pytest.mark.parametrize(
    ("environment", "flags", "said"),
    [
        (HERE, BuildFlags(hardware_compatible=True), "have failed on GPUs newer than Ampere"),
        (RTX, BuildFlags(hardware_compatible=True), "no effect"),
        (RTX, BuildFlags(same_compute_capability=True), "no effect"),
        (HERE, BuildFlags(same_compute_capability=True), None),
        (HERE, BuildFlags(), None),
    ],
)
def test_hardware_compatibility_is_warned_of(
    bundle: Bundle, builds: list[BuildJob], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    environment: Environment, flags: BuildFlags, said: str | None,
) -> None:  # fmt: skip
    with caplog.at_level(logging.WARNING):
        _build(bundle, environment, monkeypatch, flags=flags)
    assert len(caplog.messages) == (said is not None)
    assert said is None or said in caplog.messages[0]
