"""The memory plan: its arithmetic for any figures, and its result for SDXL on common cards."""

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from sdxl_trt.engines.bundle.bundle import Bundle, read_bundle
from sdxl_trt.engines.bundle.phases import Workload, run_components, run_phases, stand_ins
from sdxl_trt.engines.bundle.plan_record import BuildFlags, Environment, PlanKey, PlanMemory, PlanRecord
from sdxl_trt.engines.bundle.profile import Range, fixed
from sdxl_trt.engines.bundle.records import FileRecord
from sdxl_trt.engines.bundle.tensor_table import read_table
from sdxl_trt.engines.errors import ResourceError, SizeError, UsageError
from sdxl_trt.engines.host.memory import format_bytes
from sdxl_trt.engines.plans.shapes import RunSizes
from sdxl_trt.engines.plans.sizes import Sizes, axes_of, component_profiles, stage_sizes
from sdxl_trt.engines.residency.estimate import MemoryEstimate
from sdxl_trt.engines.residency.needs import exact_sizes, host_need
from sdxl_trt.engines.residency.policy import (
    RESIDENCIES,
    check_residency,
    estimate_memory,
    fallbacks,
    settled_residency,
)
from sdxl_trt.mini.embedded import bundle_path

MINI = read_bundle(bundle_path())
COMPONENTS = run_components(MINI.manifest, "tensorrt")
UNETS = ("unet", "refiner_unet")
ENVIRONMENT = Environment(
    flavour="tensorrt", tensorrt="11.4", gpu="G", compute_capability="8.9", driver="1", platform="linux-x86_64"
)
SIZES = exact_sizes(128, 128)
PUBLISHED = Path(__file__).parents[3] / "export" / "sources" / "published"
# Bytes of the published pair's weights in fp16, the autoencoder's in fp32.
WEIGHTS = {
    "text_encoder": 246_000_000,
    "text_encoder_2": 1_390_000_000,
    "unet": 5_135_000_000,
    "refiner_unet": 4_520_000_000,
    "vae_decoder": 198_000_000,
}
MB, GB = 10**6, 10**9


def record_of(name: str, memory: PlanMemory, sizes: Sizes = SIZES) -> PlanRecord:
    """Return a plan's record for a component of the embedded pair."""
    component = MINI.manifest.components[name]
    axes = axes_of(component.kind, component.precision, sizes, 8)
    profiles = component_profiles({spec.name: spec.shape for spec in component.inputs}, axes)
    key = PlanKey(
        component=name, graph="0" * 64, weights="0" * 64, environment=ENVIRONMENT, profiles=profiles, flags=BuildFlags()
    )
    return PlanRecord(key=key, file=FileRecord(file="f", size=1, sha256="0" * 64), memory=memory, seconds=1.0)


@st.composite
def memories(draw: st.DrawFn) -> PlanMemory:
    weights = draw(st.integers(1, 10**10))
    activations = draw(st.integers(0, 10**10))
    return PlanMemory(weights=weights, activations=activations, streamable=draw(st.integers(0, weights)))


records = st.fixed_dictionaries({name: memories() for name in COMPONENTS}).map(
    lambda figures: {name: record_of(name, memory) for name, memory in figures.items()}
)
capacities = st.integers(0, 10**11)


def plan_of(records: dict[str, PlanRecord], residency: str = "auto", capacity: int | None = None) -> MemoryEstimate:
    return estimate_memory(MINI, provider="tensorrt", capacity=capacity, residency=residency, records=records)


@given(records)
def test_swap_holds_the_larger_unet_one_block_of_activations_and_its_io(records: dict[str, PlanRecord]) -> None:
    plan = plan_of(records, "swap")
    needs = {need.component: need for need in plan.needs}
    peaks = {phase.name: phase.peak for phase in plan.phases}
    io = max(need.io for need in needs.values())
    shared = max(need.activations for need in needs.values())
    both = max(needs[unet].weights for unet in UNETS)
    assert max(peaks["base"], peaks["refiner"]) <= both + shared + io
    assert plan.peak <= max(need.weights for need in needs.values()) + shared + io
    assert peaks["base"] == needs["unet"].weights + needs["unet"].activations + needs["unet"].io


@given(records)
def test_resident_holds_all_weights_and_one_block_of_activations(records: dict[str, PlanRecord]) -> None:
    plan = plan_of(records, "resident")
    expected = sum(need.weights + need.io for need in plan.needs) + max(need.activations for need in plan.needs)
    assert {phase.peak for phase in plan.phases} == {expected}


@given(records, capacities)
def test_each_policy_needs_no_more_than_the_previous(records: dict[str, PlanRecord], capacity: int) -> None:
    resident, swap, stream = (plan_of(records, residency, capacity).peak for residency in RESIDENCIES)
    assert resident >= swap >= stream


@given(records, capacities, capacities)
def test_more_memory_is_never_worse(records: dict[str, PlanRecord], one: int, other: int) -> None:
    small, large = (plan_of(records, capacity=capacity) for capacity in sorted((one, other)))
    assert large.missing <= small.missing
    if not small.missing:
        assert RESIDENCIES.index(large.residency) <= RESIDENCIES.index(small.residency)
        assert set(small.keeps) <= set(large.keeps)
    if small.residency == large.residency == "stream":
        assert all(small.budgets[name] <= large.budgets[name] for name in UNETS)


@given(records, capacities)
def test_auto_takes_the_first_policy_that_fits(records: dict[str, PlanRecord], capacity: int) -> None:
    plan = plan_of(records, capacity=capacity)
    assert plan.usable is not None
    assert plan.missing == max(0, plan.peak - plan.usable)
    stated = [plan_of(records, residency, capacity) for residency in RESIDENCIES]
    fitting = [each.residency for each in stated if not each.missing]
    if fitting:
        assert plan.residency == fitting[0]
        assert plan.missing == 0
        plan.check()
    else:
        assert plan.missing == min(each.missing for each in stated)
        with pytest.raises(ResourceError, match=r"more than the .* that is usable; "):
            plan.check()


@given(records, capacities)
def test_budgets_are_at_most_the_streamable_weights(records: dict[str, PlanRecord], capacity: int) -> None:
    plan = plan_of(records, "stream", capacity)
    needs = {need.component: need for need in plan.needs}
    assert all(0 <= budget <= needs[name].streamable for name, budget in plan.budgets.items())
    if any(needs[name].streamable for name in UNETS):
        assert set(plan.budgets) == set(UNETS)
        base = next(phase for phase in plan.phases if phase.name == "base")
        assert plan.usable is not None
        assert base.peak <= max(plan.usable, base.peak if plan.budgets["unet"] == 0 else 0)


@given(records, st.none() | capacities)
def test_a_plan_survives_json(records: dict[str, PlanRecord], capacity: int | None) -> None:
    plan = plan_of(records, capacity=capacity)
    assert msgspec.json.decode(msgspec.json.encode(plan), type=MemoryEstimate) == plan
    assert plan.lines()


def test_with_unknown_memory_everything_stays_loaded() -> None:
    plan = estimate_memory(MINI, provider="tensorrt", capacity=None)
    assert (plan.residency, plan.missing) == ("resident", 0)
    assert "unknown" in plan.lines()[0]


@pytest.mark.parametrize("capacity", [None, 0, 1 << 50])
@pytest.mark.parametrize("provider", ["ort-cpu", "tensorrt"])
@pytest.mark.parametrize("residency", RESIDENCIES)
def test_a_given_policy_is_kept(residency: str, provider: str, capacity: int | None) -> None:
    assert estimate_memory(MINI, provider=provider, capacity=capacity, residency=residency).residency == residency


def test_the_error_lists_the_policies() -> None:
    with pytest.raises(UsageError, match="unknown residency 'all'; choose auto, resident, swap or stream"):
        check_residency("all")


def test_figures_of_plans_are_as_built_and_others_are_estimates() -> None:
    memory = PlanMemory(weights=1000, activations=10)
    records = {name: record_of(name, memory) for name in COMPONENTS}
    built, estimated = plan_of(records), plan_of({})
    assert (built.estimated, estimated.estimated) == (False, True)
    assert all("as built" in line for line in built.lines()[4:9])
    assert all("estimate, ±" in line for line in estimated.lines()[4:9])
    assert all(need.uncertain and need.weights for need in estimated.needs)
    half = {name: record for name, record in records.items() if name in UNETS}
    assert {need.component for need in plan_of(half).needs if need.uncertain} == set(COMPONENTS) - set(UNETS)


def test_the_manifests_plans_of_that_flavour_are_used() -> None:
    records = tuple(record_of(name, PlanMemory(weights=1000, activations=10)) for name in COMPONENTS)
    bundle = Bundle(MINI.root, replace(MINI.manifest, plans=records))
    assert not estimate_memory(bundle, provider="tensorrt", capacity=None).estimated
    assert estimate_memory(bundle, provider="tensorrt-rtx", capacity=None).estimated


def _three() -> dict[str, PlanRecord]:
    """Return records of the default plans: each UNet's profiles need 10, 20 and 70 MB, all other plans less."""
    plain = PlanMemory(weights=1000, activations=1)
    unets = PlanMemory(weights=1000, activations=70 * MB, profile_activations=(10 * MB, 20 * MB, 70 * MB))
    return {name: record_of(name, unets if name in UNETS else plain, stage_sizes(MINI.manifest)) for name in COMPONENTS}


def _of_unet(plan: MemoryEstimate) -> tuple[int, int]:
    (need,) = [need for need in plan.needs if need.component == "unet"]
    return need.activations, need.largest


def test_the_usual_profile_decides_and_the_largest_is_stated() -> None:
    plan = plan_of(_three(), "swap")
    assert _of_unet(plan) == (20 * MB, 70 * MB)
    assert plan.largest_peak - plan.peak == pytest.approx(50 * MB, abs=MB)
    assert plan.peak - plan.least_peak == pytest.approx(10 * MB, abs=MB)
    text = "\n".join(plan.lines())
    assert "at most" in text
    assert f"at the largest sizes that the plans take, the peak is {format_bytes(plan.largest_peak)}" in text


@pytest.mark.parametrize(
    ("side", "rows", "tokens", "activations"),
    [(128, 1, 77, 10), (128, 2, 77, 20), (96, 2, 77, 70), (128, 2, 154, 70), (64, 1, 77, 70)],
)
def test_a_run_counts_the_profile_that_it_uses(side: int, rows: int, tokens: int, activations: int) -> None:
    run = RunSizes(height=side, width=side, rows=rows, tokens=tokens)
    built = estimate_memory(MINI, provider="tensorrt", capacity=None, records=_three(), run=run)
    assert _of_unet(built) == (activations * MB, 70 * MB)
    # Estimates choose among the profiles that would be built.
    usual, asked = (
        estimate_memory(MINI, provider="tensorrt", capacity=None, records={}, run=one) for one in (None, run)
    )
    assert _of_unet(asked)[1] == _of_unet(usual)[1]
    assert (_of_unet(asked)[0] > _of_unet(usual)[0]) == (activations == 70)


def test_a_run_that_no_plan_takes_is_refused() -> None:
    run = RunSizes(height=256, width=256, rows=2, tokens=77)
    with pytest.raises(SizeError, match="unet: the plan takes"):
        estimate_memory(MINI, provider="tensorrt", capacity=None, records=_three(), run=run)


def test_a_record_without_figures_for_each_profile_counts_its_largest() -> None:
    records = {name: record_of(name, PlanMemory(weights=1000, activations=9)) for name in COMPONENTS}
    plan = plan_of(records, "swap")
    assert plan.least_peak == plan.peak == plan.largest_peak
    assert _of_unet(plan) == (9, 9)
    assert not any("at the largest sizes" in line for line in plan.lines())


@pytest.mark.parametrize("provider", ["ort-cpu", "ort-cuda"])
def test_onnxruntime_has_no_profiles(provider: str) -> None:
    run = RunSizes(height=999, width=999, rows=2, tokens=77)
    plan = estimate_memory(MINI, provider=provider, capacity=None, run=run)
    assert all(need.activations == need.largest for need in plan.needs)
    assert plan.peak == plan.largest_peak


@pytest.fixture
def sdxl() -> Bundle:
    """Return a bundle without files, with the published pair's configs and sizes."""
    manifest = MINI.manifest
    folders = {"unet": ("base", "unet"), "refiner_unet": ("refiner", "unet"), "vae_decoder": ("base", "vae")}
    components = dict(manifest.components)
    for name, size in WEIGHTS.items():
        component = components[name]
        role, model = folders.get(name, ("base", name))
        components[name] = replace(
            component,
            config=json.loads((PUBLISHED / role / model / "config.json").read_bytes()),
            weights=replace(component.weights, size=size),
            parameters=size // 2,
            precision="fp32" if name == "vae_decoder" else "fp16",
        )
    return Bundle(MINI.root, replace(manifest, components=components))


@pytest.mark.parametrize(
    ("capacity", "residency", "everything_stays"),
    [
        (24 * GB, "resident", True),
        (14 * GB, "resident", True),
        (13.2 * GB, "resident", False),
        (12 * GB, "swap", False),
        (8 * GB, "swap", False),
        (4 * GB, "stream", False),
    ],
)
def test_sdxl_on_common_cards(sdxl: Bundle, capacity: float, residency: str, *, everything_stays: bool) -> None:
    plan = estimate_memory(sdxl, provider="tensorrt", capacity=int(capacity), sizes=exact_sizes(1024, 1024))
    assert (plan.residency, plan.missing) == (residency, 0)
    assert (set(plan.keeps) == set(COMPONENTS)) == everything_stays
    if residency == "resident":
        assert set(UNETS) <= set(plan.keeps), "text encoders and the autoencoder are freed, UNets are not"


@pytest.mark.parametrize(("rows", "base", "refiner"), [(1, 177.3, 202.1), (2, 343.5, 394.0)])
def test_estimates_of_the_usual_size_are_near_the_real_builder_s(
    sdxl: Bundle, rows: int, base: float, refiner: float
) -> None:
    """SDXL's UNets in fp16 at full size, built on a CPU with the default profiles: benchmarks/results/build.md."""
    run = RunSizes(height=1024, width=1024, rows=rows, tokens=77)
    default = Sizes(**{name: Range(min=512, opt=1024, max=1280) for name in ("height", "width")},
                    batch=fixed(1), tokens=Range(min=77, opt=77, max=231))  # fmt: skip
    plan = estimate_memory(sdxl, provider="tensorrt", capacity=None, sizes=default, run=run)
    found = {need.component: need.activations / MB for need in plan.needs}
    assert (found["unet"], found["refiner_unet"]) == (pytest.approx(base, rel=0.04), pytest.approx(refiner, rel=0.04))


def test_streamed_weights_count_as_host_memory(sdxl: Bundle) -> None:
    plan = estimate_memory(sdxl, provider="tensorrt", capacity=4 * GB, sizes=exact_sizes(1024, 1024))
    there = 5_135_000_000 * 9 // 10 - plan.budgets["unet"]
    assert plan.host >= there > 1.5 * GB
    assert any("of its weights in host memory" in line for line in plan.lines())


def test_too_little_memory_is_an_error_with_the_excess(sdxl: Bundle) -> None:
    plan = estimate_memory(sdxl, provider="tensorrt", capacity=GB, sizes=exact_sizes(1024, 1024))
    assert plan.missing
    assert f"does not fit: {plan.missing / 1e6:.0f} MB too large" in plan.lines()[-1]
    with pytest.raises(ResourceError, match="try smaller pictures, or a device with more memory"):
        plan.check()


@pytest.mark.parametrize(
    ("residency", "remedy"),
    [("resident", "try --residency swap"), ("swap", "try --residency stream")],
)
def test_the_error_of_a_given_policy_names_the_next(sdxl: Bundle, residency: str, remedy: str) -> None:
    plan = estimate_memory(
        sdxl, provider="tensorrt", capacity=4 * GB, residency=residency, sizes=exact_sizes(1024, 1024)
    )
    with pytest.raises(ResourceError, match=remedy):
        plan.check()


def test_a_larger_picture_needs_more_memory(sdxl: Bundle) -> None:
    peaks = [
        estimate_memory(sdxl, provider="tensorrt", capacity=None, sizes=exact_sizes(side, side)).peak
        for side in (512, 768, 1024, 1536)
    ]
    assert peaks == sorted(set(peaks))


def test_with_onnxruntime_stream_equals_swap(sdxl: Bundle) -> None:
    stream, swap = (
        estimate_memory(sdxl, provider="ort-cpu", capacity=16 * GB, residency=residency)
        for residency in ("stream", "swap")
    )
    assert stream.reason.startswith("as swap: no weight streaming with ort-cpu")
    assert (stream.peak, stream.budgets) == (swap.peak, {})
    assert estimate_memory(sdxl, provider="ort-cpu", capacity=1).residency == "swap"
    assert fallbacks(swap) == ()


def test_fallbacks_are_the_smaller_policies(sdxl: Bundle) -> None:
    def next_of(residency: str) -> tuple[str, ...]:
        return fallbacks(estimate_memory(sdxl, provider="tensorrt", capacity=None, residency=residency))

    assert [next_of(residency) for residency in RESIDENCIES] == [("swap", "stream"), ("stream",), ()]


def test_on_the_host_each_session_has_its_own_activations(sdxl: Bundle) -> None:
    plan = estimate_memory(sdxl, provider="ort-cpu", capacity=None)
    assert plan.peak == sum(need.weights + need.io + need.activations for need in plan.needs)
    assert plan.host == 0, "the files are memory-mapped"


def test_on_the_host_a_component_needs_more_than_its_fp32_weights(component_of: Callable[..., object]) -> None:
    fp32, fp16 = (host_need(component_of("unet", 1_000_000, precision)) for precision in ("fp32", "fp16"))
    assert 1.4 * 4_000_000 <= fp32 <= 2 * 4_000_000
    assert 1.9 * 4_000_000 <= fp16 <= 2.5 * 4_000_000


def test_phases_are_those_of_a_run_and_tensorrt_uses_the_bf16_twin() -> None:
    phases = run_phases(MINI.manifest, "tensorrt")
    assert list(phases) == ["encode", "base", "refiner", "decode"]
    assert phases["encode"] == ("text_encoder", "text_encoder_2")
    twin = replace(MINI.manifest.base.vae, decoder_bf16="vae_decoder_bf16")
    stages = {
        "base": replace(MINI.manifest.base, vae=twin), "refiner": replace(MINI.manifest.refiner, vae=twin)
    }  # fmt: skip
    manifest = replace(MINI.manifest, **stages)
    assert run_phases(manifest, "tensorrt")["decode"] == ("vae_decoder_bf16",)
    assert run_phases(manifest, "ort-cuda")["decode"] == ("vae_decoder",)
    assert stand_ins(manifest, "tensorrt-rtx") == {"vae_decoder": "vae_decoder_bf16"}
    assert stand_ins(manifest, "ort-cpu") == {}
    assert stand_ins(manifest, "tensorrt", "7.5") == {}
    assert run_phases(manifest, "tensorrt", capability="7.5")["decode"] == ("vae_decoder",)
    assert run_phases(manifest, "tensorrt", capability="8.0")["decode"] == ("vae_decoder_bf16",)


def test_without_a_refiner_there_is_no_refiner_phase() -> None:
    manifest = replace(MINI.manifest, refiner=None)
    plan = estimate_memory(Bundle(MINI.root, manifest), provider="tensorrt", capacity=None)
    assert [phase.name for phase in plan.phases] == ["encode", "base", "decode"]


def test_a_single_run_on_a_cpu_swaps() -> None:
    assert settled_residency("auto", "ort-cpu", once=True) == "swap"
    assert settled_residency("auto", "ort-cpu", once=False) == "auto"
    assert settled_residency("resident", "ort-cpu", once=True) == "resident"
    assert settled_residency("auto", "tensorrt", once=True) == "auto"


@pytest.mark.parametrize("residency", ["resident", "swap"])
def test_the_base_is_loaded_together_with_its_controlnets(controlled: Path, residency: str) -> None:
    bundle = read_bundle(controlled)
    kept = {}
    for controls in ((), ("controlnet_2",), ("controlnet", "controlnet_2")):
        plan = estimate_memory(bundle, provider="tensorrt", capacity=GB, residency=residency,
                               workload=Workload(controls=controls))  # fmt: skip
        phases = {phase.name: phase for phase in plan.phases}
        assert phases["base"].components == ("unet", *controls)
        assert {"unet", *controls} <= set(phases["base"].loaded)
        kept[len(controls)] = phases["base"].peak
        assert [need.component for need in plan.needs if need.component.startswith("controlnet")] == [*controls]
    assert kept[0] < kept[1] < kept[2]


def test_a_streaming_budget_leaves_room_for_the_controlnet(controlled: Path) -> None:
    bundle = read_bundle(controlled)
    capacity = next(size for size in range(GB // 100, GB, GB // 1000) if not _streamed(bundle, size, ()).missing)
    alone, together = (_streamed(bundle, capacity, controls) for controls in ((), ("controlnet",)))
    assert together.budgets["unet"] < alone.budgets["unet"]
    assert together.budgets["refiner_unet"] == alone.budgets["refiner_unet"]


def _streamed(bundle: Bundle, capacity: int, controls: tuple[str, ...]) -> MemoryEstimate:
    return estimate_memory(bundle, provider="tensorrt", capacity=capacity, residency="stream",
                           workload=Workload(controls=controls))  # fmt: skip


def test_a_plan_for_loras_counts_their_inputs_as_an_estimate() -> None:
    plain = {name: record_of(name, PlanMemory(weights=GB, activations=MB)) for name in COMPONENTS}
    slotted = replace(plain["unet"], key=replace(plain["unet"].key, lora_rank=64))
    before, after = (
        {need.component: need for need in plan_of(records, "swap").needs}
        for records in (plain, plain | {"unet": slotted})
    )
    slots = read_table(MINI, "unet").slots_by_module.values()
    factors = 2 * 64 * sum(slot.columns + slot.outputs for slot in slots)
    assert after["unet"].io - before["unet"].io == after["unet"].uncertain == factors > 0
    assert after["refiner_unet"] == before["refiner_unet"]
    # A request whose LoRAs have lower ranks needs less, so nothing is refused for these bytes alone.
    assert plan_of(plain | {"unet": slotted}, "swap", capacity=GB).estimated


def test_plans_for_loras_are_not_those_of_a_request_without_any() -> None:
    plain = record_of("unet", PlanMemory(weights=GB, activations=MB))
    slotted = replace(plain, key=replace(plain.key, lora_rank=64), memory=PlanMemory(weights=2 * GB, activations=MB))
    for plans in ((plain, slotted), (slotted, plain)):
        bundle = Bundle(MINI.root, replace(MINI.manifest, plans=plans))
        (need,) = [each for each in estimate_memory(bundle, provider="tensorrt", capacity=None).needs
                   if each.component == "unet"]  # fmt: skip
        assert need.weights == GB
