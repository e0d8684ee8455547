"""Whole runs, base to refiner, on the simulated device: the CPU's picture, few copied bytes, one change of UNets."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from sdxl_trt.engines.adapters.file import open_lora
from sdxl_trt.engines.adapters.scaled import ScaledLora
from sdxl_trt.engines.bundle.bundle import Bundle, read_bundle
from sdxl_trt.engines.bundle.plan_record import PlanRecord
from sdxl_trt.engines.bundle.tensor_table import read_table
from sdxl_trt.engines.errors import EngineError, IncompatibleError, ResourceError, SdxlTrtError
from sdxl_trt.engines.residency.policy import estimate_memory
from sdxl_trt.runtime import Request, open_bundle
from sdxl_trt.runtime.pipeline import pipeline as pipeline_module

pytestmark = pytest.mark.slow

RESIDENCIES = ("resident", "swap", "stream")
UNETS = {"unet", "refiner_unet"}
TOLERANCE = 1e-3
ALIGNMENT = 256


def _request(count: int = 1, steps: int = 4, guidance: float = 4.0) -> Request:
    return Request("a red fox", seed=7, steps=steps, handoff=0.5, guidance=guidance, count=count)


def _latents(root: Path, provider: str, request: Request, residency: str = "auto") -> list[Any]:
    with open_bundle(root, provider=provider, residency=residency) as pipeline:
        return [picture.latents for picture in pipeline.generate(request)]


@pytest.fixture(scope="module")
def exported(pairs: Callable[[str], Any]) -> Path:
    return Path(pairs("outline").bundle)


@pytest.fixture(scope="module")
def reference(exported: Path) -> list[Any]:
    """Return the CPU provider's latents for `_request(2)`."""
    return _latents(exported, "ort-cpu", _request(2))


@pytest.fixture
def planned(simulated: Any, exported: Path, tmp_path: Path) -> Path:
    return Path(simulated.bundle(exported, tmp_path / "bundle", weight_streaming=True))


def _assert_same(latents: list[Any], expected: list[Any]) -> None:
    worst = max(float(np.abs(a - b).max()) for a, b in zip(latents, expected, strict=True))
    assert worst <= TOLERANCE, f"max abs difference {worst:.2e}, {TOLERANCE:.0e} is allowed"


def _records(bundle: Bundle) -> dict[str, PlanRecord]:
    return {record.key.component: record for record in bundle.manifest.plans}


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_the_picture_equals_the_cpu_s(simulated: Any, planned: Path, reference: list[Any], residency: str) -> None:
    request = _request(2)
    _assert_same(_latents(planned, "tensorrt", request, residency), reference)
    experts = [name for name in simulated.executed if name in UNETS]
    assert experts == ["unet"] * 4 + ["refiner_unet"] * 4


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_a_step_copies_only_latents_timestep_and_prediction(simulated: Any, planned: Path, residency: str) -> None:
    request, seen = _request(steps=8), []
    with open_bundle(planned, provider="tensorrt", residency=residency) as pipeline:
        for step in pipeline.steps(request):
            moved = simulated.since()
            # Before the first step of a UNet its constants are bound.
            if step.stage in ("base", "refiner") and step.index > 1:
                assert step.latents is not None
                rows = 2 * step.latents.nbytes
                # Under `resident` the refiner's weights are copied while the base computes.
                assert moved.pop("weights", 0) == 0 or residency == "resident"
                assert moved == {"HostToDevice": rows + 2 * 4, "DeviceToHost": rows}
                seen.append(step.stage)
    assert set(seen) == {"base", "refiner"}


def test_the_unets_never_share_memory_under_swap(simulated: Any, planned: Path) -> None:
    records = _records(read_bundle(planned))
    weights = max(records[name].memory.weights for name in UNETS)
    activations = max(record.memory.activations for record in records.values())
    inputs_and_outputs = 0
    for name in UNETS:
        shapes = simulated_shapes(records[name])
        inputs_and_outputs = max(inputs_and_outputs, sum(4 * int(np.prod(shape)) + ALIGNMENT for shape in shapes))
    _latents(planned, "tensorrt", _request(), "swap")
    assert weights < simulated.peak_bytes <= weights + activations + inputs_and_outputs
    swapped = simulated.peak_bytes
    simulated.reset_peak()
    _latents(planned, "tensorrt", _request(), "resident")
    assert simulated.peak_bytes >= swapped + min(records[name].memory.weights for name in UNETS)


def test_a_run_from_a_picture_equals_the_cpu_s(simulated: Any, planned: Path, exported: Path) -> None:
    """The encoder's plan encodes a picture of the usual size whole; the memory plan includes it."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    request = replace(_request(2), image=pixels, strength=0.75)
    expected = _latents(exported, "ort-cpu", request)
    with open_bundle(planned, provider="tensorrt", residency="swap", plan_for=request) as pipeline:
        _assert_same([picture.latents for picture in pipeline.generate(request)], expected)
        assert pipeline.pool.loads[0] == "vae_encoder"


def simulated_shapes(record: PlanRecord) -> list[tuple[int, ...]]:
    """Return the largest shapes of a UNet's inputs and of its output, which equals the sample's."""
    profile = record.key.profiles[-1]
    largest = {name: shapes[2] for name, shapes in profile.shapes.items()}
    return [*largest.values(), largest["sample"]]


@pytest.mark.parametrize("count", [1, 8, 100])
def test_the_unets_change_once_for_any_number_of_pictures(simulated: Any, planned: Path, count: int) -> None:
    request = _request(count, steps=2, guidance=1.0)
    with open_bundle(planned, provider="tensorrt", residency="swap") as pipeline:
        latents = [picture.latents for picture in pipeline.generate(request)]
        assert pipeline.pool.swaps == 1
    assert len(latents) == count
    records = _records(read_bundle(planned))
    for name in UNETS:
        assert simulated.deserialized.count(records[name].file.sha256) == 1
    experts = [name for name in simulated.executed if name in UNETS]
    assert experts == sorted(experts, key="unet".__ne__)  # phase by phase


MB = 10**6


@pytest.fixture
def ranged(simulated: Any, exported: Path, tmp_path: Path) -> Bundle:
    """Return plans whose range needs 40 MB of activations, and each single size 1 MB; the weights are small."""

    def activations(name: str, profile: Any) -> int:
        return 40 * MB if name in UNETS and any(low != high for low, _, high in profile.shapes.values()) else MB

    return read_bundle(simulated.bundle(exported, tmp_path / "ranged", activations=activations))


def _usual_peak(bundle: Bundle, residency: str) -> int:
    return estimate_memory(bundle, provider="tensorrt", capacity=None, residency=residency).peak


def test_a_size_that_does_not_fit_is_refused_before_anything_is_loaded(simulated: Any, ranged: Bundle) -> None:
    limit = _usual_peak(ranged, "resident") + 20 * MB
    with open_bundle(ranged.root, provider="tensorrt", available=limit) as pipeline:
        limits = pipeline.pool.limits
        assert limits is not None
        other = replace(_request(), width=limits.width.min, height=limits.height.min)
        assert other.width != limits.width.opt
        with pytest.raises(ResourceError) as raised:
            pipeline.steps(other)
        assert simulated.deserialized == []
        assert len(list(pipeline.generate(_request()))) == 1
    words = str(raised.value)
    assert words.startswith(f"{other.width}x{other.height} with 77 tokens: tensorrt, residency ")
    assert f"the plans' usual size, {limits.width.opt}x{limits.height.opt} with 77 tokens, needs 39" in words
    assert "\n" not in words


def test_a_longer_prompt_that_does_not_fit_is_refused_before_a_unet_runs(simulated: Any, ranged: Bundle) -> None:
    request = replace(_request(), compat="comfyui", prompt="a red fox " * 50)
    limit = _usual_peak(ranged, "resident") + 20 * MB
    with (
        open_bundle(ranged.root, provider="tensorrt", available=limit) as pipeline,
        pytest.raises(ResourceError, match=r"with (154|231) tokens: tensorrt, residency"),
    ):
        list(pipeline.generate(request))
    assert not UNETS & set(simulated.executed)


def test_a_size_that_needs_more_memory_continues_with_a_smaller_residency(
    simulated: Any, ranged: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    resident, swap = (
        estimate_memory(ranged, provider="tensorrt", capacity=None, residency=residency).largest_peak
        for residency in ("resident", "swap")
    )
    with open_bundle(ranged.root, provider="tensorrt", available=int((resident + swap) / 2 / 0.9)) as pipeline:
        assert pipeline.pool.residency == "resident"
        assert len(list(pipeline.generate(_request()))) == 1
        assert pipeline.pool.residency == "resident"
        limits = pipeline.pool.limits
        assert limits is not None
        other = replace(_request(), width=limits.width.min, height=limits.height.min)
        assert len(list(pipeline.generate(other))) == 1
        assert pipeline.pool.residency == "swap"
    assert f"{other.width}x{other.height} needs more memory than there is; continuing with swap" in caplog.text


def test_both_flavours_run(simulated: Any, exported: Path, tmp_path: Path, reference: list[Any]) -> None:
    simulated.install("tensorrt-rtx")
    root = simulated.bundle(exported, tmp_path / "bundle")
    _assert_same(_latents(root, "tensorrt-rtx", _request(2), "swap"), reference)


@pytest.fixture
def clean(simulated: Any) -> Iterator[None]:
    """Check at the end that the device is empty; the fixture `simulated` checks everything else."""
    yield
    assert simulated.current_bytes == 0


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("n", [1, 3, 6, 10, 15])
def test_memory_may_run_out_anywhere(simulated: Any, planned: Path, n: int) -> None:
    simulated.fail_allocation(n)
    with pytest.raises(ResourceError, match="out of memory; try --residency"):
        _latents(planned, "tensorrt", _request(), "resident")


@pytest.mark.usefixtures("clean")
def test_auto_falls_back_after_out_of_memory(simulated: Any, planned: Path, reference: list[Any]) -> None:
    with open_bundle(planned, provider="tensorrt", residency="auto") as pipeline:
        chosen = pipeline.pool.residency
        simulated.fail_allocation(1)
        latents = [picture.latents for picture in pipeline.generate(_request(2))]
        assert pipeline.pool.residency != chosen
    _assert_same(latents, reference)


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("share", [0.05, 0.2, 0.4, 0.6, 0.8, 0.95])
def test_the_device_may_be_lost_anywhere(simulated: Any, planned: Path, share: float) -> None:
    _latents(planned, "tensorrt", _request(), "swap")
    simulated.sticky_after(int(share * simulated.calls.total()))
    with pytest.raises(EngineError):
        _latents(planned, "tensorrt", _request(), "swap")


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("failure", ["fail_next_deserialize", "fail_next_execute", "fail_capture"])
def test_a_single_failure_raises_cleanly_or_is_survived(
    simulated: Any, planned: Path, reference: list[Any], failure: str
) -> None:
    getattr(simulated, failure)()
    if failure == "fail_capture":
        _assert_same(_latents(planned, "tensorrt", _request(2), "swap"), reference)
    else:
        with pytest.raises(SdxlTrtError):
            _latents(planned, "tensorrt", _request(), "swap")
    _assert_same(_latents(planned, "tensorrt", _request(2), "swap"), reference)


RANK = 8


def _write_lora(path: Path, bundle: Bundle, rank: int, seed: int) -> Path:
    """Write a LoRA for every second slot of the base's UNet and encoders."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name in ("unet", "text_encoder", "text_encoder_2"):
        for slot in list(read_table(bundle, name).slots_by_module.values())[::2]:
            shapes = {"down": (rank, slot.inputs, *slot.kernel), "up": (slot.outputs, rank, *(1 for _ in slot.kernel))}
            for part, shape in shapes.items():
                values = rng.standard_normal(shape) / 8
                tensors[f"{name}.{slot.module}.lora_{part}.weight"] = values.astype(np.float32)
    save_file(tensors, path)
    return path


@pytest.fixture
def slotted(simulated: Any, exported: Path, tmp_path: Path) -> Path:
    return Path(simulated.bundle(exported, tmp_path / "slotted", lora_rank=RANK))


@pytest.fixture
def wear(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that sets the base's LoRAs of all further requests."""
    resolve = pipeline_module.resolve_request

    def wear(*loras: ScaledLora) -> None:
        monkeypatch.setattr(
            pipeline_module, "resolve_request", lambda *given: replace(resolve(*given), loras={"base": loras})
        )

    return wear


def test_loras_change_between_requests(
    simulated: Any, slotted: Path, exported: Path, tmp_path: Path, wear: Callable[..., None]
) -> None:
    """One LoRA, two, none: the CPU's picture each time; the second LoRA is only copied to the device."""
    bundle = read_bundle(exported)
    one, other = (ScaledLora(open_lora(_write_lora(tmp_path / f"{rank}.safetensors", bundle, rank, rank)), scale)
                  for rank, scale in ((4, 0.7), (3, -0.4)))  # fmt: skip
    sets = [(one,), (one, other), ()]
    expected = []
    with open_bundle(exported, provider="ort-cpu") as pipeline:
        for loras in sets:
            wear(*loras)
            expected += [picture.latents for picture in pipeline.generate(_request())]
    assert np.abs(expected[2] - expected[0]).max() > 0.05, "the LoRA has no effect"
    moved = []
    with open_bundle(slotted, provider="tensorrt", residency="resident") as pipeline:
        for loras, latents in zip(sets, expected, strict=True):
            wear(*loras)
            simulated.since()
            _assert_same([picture.latents for picture in pipeline.generate(_request())], [latents])
            moved.append(simulated.since().get("weights", 0))
    assert simulated.current_bytes == 0
    weights = {record.key.component: record.memory.weights for record in read_bundle(slotted).manifest.plans}
    # The refiner reads its prompt with the second encoder as it is, so that one changes its plan in every request.
    once = weights["text_encoder_2"]
    assert moved[1:] == [once, once + weights["text_encoder"] + weights["unet"]], "a UNet was loaded for other LoRAs"


def test_without_plans_for_loras_a_request_names_the_command(
    planned: Path, exported: Path, tmp_path: Path, wear: Callable[..., None]
) -> None:
    lora = ScaledLora(open_lora(_write_lora(tmp_path / "a.safetensors", read_bundle(exported), 4, 1)), 1.0)
    wear(lora)
    with open_bundle(planned, provider="tensorrt") as pipeline:
        with pytest.raises(IncompatibleError, match=r"no tensorrt plan for LoRAs of text_encoder; .*--lora-rank 128"):
            list(pipeline.generate(_request()))
        wear()
        assert list(pipeline.generate(_request()))
