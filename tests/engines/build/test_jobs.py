"""Which plans are kept and which are built, what is refused before a build, and the warnings of a build."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sdxl_trt.engines.build import bundle_plans
from sdxl_trt.engines.build.bundle_plans import build_plans, drop_onnx
from sdxl_trt.engines.build.jobs import _place, plan_builds
from sdxl_trt.engines.build.messages import BuildJob, BuiltPlan
from sdxl_trt.engines.bundle import Bundle, Chunks, FileRecord, PlanMemory, PlanRecord, Range, read_bundle
from sdxl_trt.engines.bundle.plan_record import ANY, BuildFlags, Environment
from sdxl_trt.engines.errors import IncompatibleError, UsageError
from sdxl_trt.engines.plans.files import plan_path
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


def _built(bundle: Bundle, environment: Environment, flags: BuildFlags | None = None, lora_rank: int = 0) -> Bundle:
    """Return the bundle with a plan of each component, as if built in `environment`."""
    records = []
    for job in plan_builds(bundle, environment, flags=flags, lora_rank=lora_rank):
        stem = f"{job.component}{'-lora' * bool(job.key.lora_rank)}"
        file = FileRecord(file=f"plans/{stem}.plan", size=len(PLAN), sha256=hashlib.sha256(PLAN).hexdigest())
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


def test_8_bits_are_refused_on_gpus_without_them_before_a_build(bundle: Bundle) -> None:
    fp8, int8 = (_precision(bundle, each, "unet", "refiner_unet") for each in ("fp8", "int8"))
    older = {name: msgspec.structs.replace(HERE, gpu=name, compute_capability=capability)
             for name, capability in {"A100": "8.0", "4090": "8.9", "V100": "7.0"}.items()}  # fmt: skip
    said = (r"refiner_unet, unet in fp8, which A100 \(compute capability 8\.0\) cannot compute, 8\.9 is needed; export"
            " again with --int8 or --fp16$")  # fmt: skip
    with pytest.raises(IncompatibleError, match=said):
        plan_builds(fp8, older["A100"])
    with pytest.raises(IncompatibleError, match=r"in int8, which V100 .* 7\.5 is needed; export again with --fp16$"):
        plan_builds(int8, older["V100"])
    with pytest.raises(IncompatibleError, match=r"in fp8, which V100 .* export again with --fp16$"):
        plan_builds(fp8, older["V100"])
    for allowed, where in ((fp8, HERE), (fp8, older["4090"]), (fp8, RTX), (int8, TURING), (int8, older["A100"])):
        assert plan_builds(allowed, where)
    ampere = BuildFlags(hardware_compatible=True)
    with pytest.raises(IncompatibleError, match=r"ampere: refiner_unet, unet in fp8, .*-compatible same"):
        plan_builds(fp8, HERE, flags=ampere)
    assert plan_builds(int8, HERE, flags=ampere)


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
    assert [job.timing_cache for job in builds] == [None, None]  # a UNet, and its shallow one
    (warning,) = caplog.messages
    assert warning == f"--timing-cache {cache}: ignored, since TensorRT for RTX times no kernels while it builds"
    _build(bundle, HERE, monkeypatch, timing_cache=cache)
    assert builds[2].timing_cache == cache
    assert len(caplog.messages) == 1


def test_the_driver_of_a_build_is_recorded_beside_the_key(
    bundle: Bundle, builds: list[BuildJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    record, _ = _build(bundle, HERE, monkeypatch).manifest.plans
    assert (record.driver, record.built_with, record.key.environment.driver) == ("580.1", "580.1", ANY)
    record, _ = _build(bundle, RTX, monkeypatch).manifest.plans
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


RANK = 64
ADAPTED = ["text_encoder", "text_encoder_2", "unet", "refiner_unet", "unet_shallow", "refiner_unet_shallow"]


def test_fp8_plans_for_every_rtx_gpu_are_warned_of(
    bundle: Bundle, builds: list[BuildJob], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fp8 = _precision(bundle, "fp8", "unet")
    with caplog.at_level(logging.WARNING):
        bundle_plans._warn_of_older_gpus(fp8, plan_builds(fp8, HERE))
        assert not caplog.messages
        bundle_plans._warn_of_older_gpus(fp8, plan_builds(fp8, RTX))
    assert caplog.messages == [
        "unet in fp8: plans of TensorRT for RTX that GPUs of compute capability 8.9 and later run"]  # fmt: skip


@pytest.fixture
def slotted(bundle: Bundle) -> Bundle:
    """Return the bundle with a slot graph of every UNet and text encoder."""
    parts = {
        name: msgspec.structs.replace(
            part, slot_graph=FileRecord(file=f"{name}/adapters.onnx", size=1, sha256=f"{number}" * 64)
        ) if name in ADAPTED else part
        for number, (name, part) in enumerate(bundle.manifest.components.items())
    }  # fmt: skip
    return Bundle(bundle.root, msgspec.structs.replace(bundle.manifest, components=parts))


def test_a_lora_rank_adds_a_plan_of_every_unet_and_text_encoder(slotted: Bundle) -> None:
    plain, both = plan_builds(slotted, HERE), plan_builds(slotted, HERE, lora_rank=RANK)
    assert [job.key for job in both if not job.key.lora_rank] == [job.key for job in plain]
    added = {job.component: job.key for job in both if job.key.lora_rank}
    assert sorted(added) == sorted(ADAPTED)
    for name, key in added.items():
        graph = slotted.manifest.components[name].slot_graph
        assert graph is not None
        assert (key.graph, key.lora_rank) == (graph.sha256, RANK)
        assert f"{name}-tensorrt-lora64-" in plan_path(key)
        (usual,) = [job.key for job in plain if job.component == name]
        assert key.profiles == usual.profiles, "the manifest does not list a thousand inputs"


def test_plans_for_loras_stand_beside_the_others(slotted: Bundle) -> None:
    built = _built(slotted, HERE, lora_rank=RANK)
    assert _kept(built, HERE) == {True}
    assert {job.record is not None for job in plan_builds(built, HERE, lora_rank=RANK)} == {True}
    other = [job for job in plan_builds(built, HERE, lora_rank=32) if job.record is None]
    assert sorted(job.component for job in other) == sorted(ADAPTED)
    assert {job.reasons for job in other} == {("a LoRA rank of 32 is requested, the plan was built for 64",)}
    places = {_place(record.key) for record in built.manifest.plans}
    assert len(places) == len(built.manifest.plans)


def test_the_slot_graph_counts_for_its_plans_only(slotted: Bundle) -> None:
    built = _built(slotted, HERE, lora_rank=RANK)
    parts = dict(built.manifest.components)
    parts["unet"] = msgspec.structs.replace(
        parts["unet"], slot_graph=FileRecord(file="unet/adapters.onnx", size=1, sha256="f" * 64)
    )
    changed = Bundle(built.root, msgspec.structs.replace(built.manifest, components=parts))
    stale = [job for job in plan_builds(changed, HERE, lora_rank=RANK) if job.record is None]
    assert [(job.component, job.key.lora_rank) for job in stale] == [("unet", RANK)]
    assert stale[0].reasons == ("the graph was exported again after the plan was built",)


def test_a_bundle_without_slot_graphs_is_refused_before_a_build(slotted: Bundle) -> None:
    parts = dict(slotted.manifest.components)
    parts["unet"] = msgspec.structs.replace(parts["unet"], slot_graph=None)
    older = Bundle(slotted.root, msgspec.structs.replace(slotted.manifest, components=parts))
    with pytest.raises(IncompatibleError, match=r"--lora-rank: .* \(unet has none\); export it again"):
        plan_builds(older, HERE, lora_rank=RANK)


def test_plans_only_needs_the_usual_plans_too(slotted: Bundle) -> None:
    built = _built(slotted, HERE, lora_rank=RANK)
    slots = tuple(record for record in built.manifest.plans if record.for_loras)
    with pytest.raises(UsageError, match=r"unet.* would be left without a plan"):
        drop_onnx(Bundle(built.root, msgspec.structs.replace(built.manifest, plans=slots)))


def test_a_plan_for_loras_is_built_of_the_slot_graph(
    slotted: Bundle, builds: list[BuildJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle_plans, "read_bundle", lambda root, partial: slotted)
    _build(slotted, HERE, monkeypatch, lora_rank=RANK)
    assert sorted(job.graph.name for job in builds) == [
        "adapters.onnx", "adapters.onnx", "model.onnx", "shallow.onnx"]  # fmt: skip
    ranks = {job.graph.name: job.lora_rank for job in builds}
    assert ranks == {"model.onnx": None, "shallow.onnx": None, "adapters.onnx": Range(min=1, opt=16, max=RANK)}
