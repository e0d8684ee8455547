"""The choice of a provider, and residencies on the simulated device, within the planned memory."""

import importlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from sdxl_trt.engines.backends import open as providers
from sdxl_trt.engines.backends.cuda.driver import Problem
from sdxl_trt.engines.backends.ort import providers as ort_providers
from sdxl_trt.engines.bundle.bundle import Bundle, read_bundle
from sdxl_trt.engines.bundle.phases import run_components
from sdxl_trt.engines.engine import Engine, numpy_dtype
from sdxl_trt.engines.errors import CorruptError, IncompatibleError, ResourceError, UsageError
from sdxl_trt.engines.plans.files import start_reading
from sdxl_trt.engines.plans.reading import PlanReader
from sdxl_trt.engines.residency.estimate import MemoryEstimate
from sdxl_trt.engines.residency.opening import open_pool
from sdxl_trt.engines.residency.policy import RESIDENCIES, estimate_memory
from sdxl_trt.engines.residency.pool import EnginePool
from sdxl_trt.mini.embedded import bundle_path
from sdxl_trt.runtime import Pipeline, Request, open_bundle

pytestmark = pytest.mark.slow

RUN = ("text_encoder", "text_encoder_2", "unet", "refiner_unet", "vae_decoder")
UNETS = ("unet", "refiner_unet")
SIZES: dict[str, Any] = {"height": 64, "width": 64, "batch": (1, 1, 2), "tokens": 77}
LARGEST = {"rows": 4, "pictures": 1, "prompts": 8, "vectors": 1, "height": 8, "width": 8, "tokens": 77}
EMBEDDED = read_bundle(bundle_path())


@pytest.fixture
def planned(simulated, tmp_path: Path) -> Callable[..., Bundle]:
    """Return a function that returns the embedded bundle with plans for the simulated device."""

    def make(**options: Any) -> Bundle:
        return read_bundle(simulated.bundle(EMBEDDED.root, tmp_path / "bundle", **(SIZES | options)))

    return make


def infer(engine: Engine) -> None:
    """Run an engine at the largest sizes that its plan accepts."""
    rng = np.random.default_rng(0)
    inputs = {}
    for spec in engine.component.inputs:
        shape = tuple(LARGEST[axis] if isinstance(axis, str) else axis for axis in spec.shape)
        values = rng.integers(0, 99, shape) if spec.dtype == "int64" else rng.standard_normal(shape)
        if spec.name == "embedding_index":
            values %= LARGEST["vectors"] + 1
        inputs[spec.name] = values.astype(numpy_dtype(spec))
    engine.infer(inputs)


def run(pool: EnginePool) -> None:
    for name, after in zip(RUN, (*RUN[1:], ""), strict=True):
        (engine,) = pool.phase(name, next_engines=(after,) if after else ())
        infer(engine)


def plan_of(bundle: Bundle, residency: str, capacity: int | None = None) -> MemoryEstimate:
    return estimate_memory(bundle, provider="tensorrt", capacity=capacity, residency=residency)


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_a_run_needs_no_more_than_planned(planned, simulated, residency: str) -> None:
    bundle = planned(weight_streaming=True)
    planned_peak = plan_of(bundle, "swap" if residency == "stream" else residency).largest_peak
    with open_pool(bundle, "tensorrt", residency) as pool:
        run(pool)
        assert pool.residency == residency
        assert pool.swaps == (0 if residency == "resident" else 1)
        run(pool)
        assert 0.5 * planned_peak < simulated.peak_bytes <= planned_peak + 256 * 64, "blocks are rounded up"
        assert pool.limits is not None
        assert pool.limits.pictures == 2
    assert simulated.current_bytes == 0


def test_under_swap_the_device_never_holds_two_unets(planned, simulated) -> None:
    bundle = planned()
    needs = {need.component: need for need in plan_of(bundle, "swap").needs}
    with open_pool(bundle, "tensorrt", "swap") as pool:
        run(pool)
        simulated.reset_peak()
        pool.phase("unet", next_engines=("refiner_unet",))
        pool.phase("refiner_unet")
        bound = max(needs[name].weights for name in UNETS) + max(needs[name].largest for name in UNETS)
        assert simulated.peak_bytes <= bound + max(needs[name].io for name in UNETS) + 256 * 64
        assert simulated.peak_bytes < sum(needs[name].weights for name in UNETS)


def test_streamed_weights_stay_off_the_device(planned, simulated) -> None:
    bundle = planned(weight_streaming=True)
    swap = plan_of(bundle, "swap")
    with open_pool(bundle, "tensorrt", "stream", available=swap.peak) as pool:
        pool.phase("unet")
        needs = {need.component: need for need in swap.needs}
        assert simulated.peak_bytes < needs["unet"].weights + needs["unet"].largest
    assert simulated.current_bytes == 0


def test_out_of_memory_falls_back_to_a_policy_that_fits(planned, simulated, caplog: pytest.LogCaptureFixture) -> None:
    bundle = planned()
    simulated.memory_limit = int(1.05 * plan_of(bundle, "swap").largest_peak)
    with open_pool(bundle, "tensorrt", "auto", available=1 << 40) as pool:
        assert pool.residency == "resident"
        run(pool)
        assert (pool.residency, pool.swaps) == ("swap", 1)
    assert "continuing with swap" in caplog.text
    assert simulated.current_bytes == 0


def test_a_given_residency_that_does_not_fit_is_an_error(planned, simulated) -> None:
    bundle = planned()
    simulated.memory_limit = int(1.05 * plan_of(bundle, "swap").largest_peak)
    with open_pool(bundle, "tensorrt", "resident", available=1 << 40) as pool, pytest.raises(ResourceError):
        run(pool)
    with pytest.raises(ResourceError, match="try --residency swap"):
        open_pool(bundle, "tensorrt", "resident")
    assert simulated.current_bytes == 0


def test_auto_plans_with_the_free_memory(planned, simulated) -> None:
    bundle = planned()
    simulated.memory_limit = int(1.2 * plan_of(bundle, "swap").peak)
    with open_pool(bundle) as pool:
        assert (pool.provider, pool.residency) == ("tensorrt", "swap")
        run(pool)


def test_plans_that_cannot_fit_are_refused_before_anything_is_loaded(planned, simulated) -> None:
    bundle = planned()
    simulated.memory_limit = plan_of(bundle, "swap").peak // 2
    with pytest.raises(ResourceError, match=r"needs .* MB, .* MB more than"):
        open_pool(bundle, "tensorrt")
    assert simulated.deserialized == []
    assert simulated.current_bytes == 0


@pytest.mark.parametrize("provider", ["auto", "tensorrt"])
def test_a_stale_plan_is_an_error_even_under_auto(planned, simulated, provider: str) -> None:
    bundle = planned()
    simulated.version = "11.9.0"
    simulated.compute_capability = (9, 0)
    with pytest.raises(IncompatibleError, match="does not fit"):
        open_pool(bundle, provider)


def test_plans_without_their_library_are_a_warning_under_auto(
    planned, simulated, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = planned()
    simulated.remove()
    with caplog.at_level(logging.WARNING), open_pool(bundle) as pool:
        assert pool.provider == "ort-cpu"
    assert "the bundle's tensorrt plans are not used: " in caplog.text
    with pytest.raises(IncompatibleError):
        open_pool(bundle, "tensorrt")


def test_plans_of_another_driver_are_used_with_one_warning(
    planned, simulated, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = planned(environment=msgspec.structs.replace(simulated.environment(), driver="1.2"))
    with caplog.at_level(logging.WARNING), open_pool(bundle, "tensorrt") as pool:
        assert pool.provider == "tensorrt"
    (warning,) = caplog.messages
    assert warning.startswith("plans are used that were built with NVIDIA driver 1.2, here is ")


def _with_twin(bundle: Bundle) -> Bundle:
    """Return the bundle with a bf16 twin of its decoder in the manifest, which has no plan."""
    manifest, replace = bundle.manifest, msgspec.structs.replace
    vae = replace(manifest.base.vae, decoder_bf16="vae_decoder_bf16")
    stages: dict[str, Any] = {name: replace(stage, vae=vae) for name, stage in manifest.stages().items()}
    parts = manifest.components | {"vae_decoder_bf16": replace(manifest.components["vae_decoder"], precision="bf16")}
    return Bundle(bundle.root, replace(manifest, components=parts, **stages))


def test_turing_decodes_without_the_bf16_twin(planned, simulated) -> None:
    simulated.compute_capability = (7, 5)
    with open_pool(_with_twin(planned()), "tensorrt", "swap") as pool:
        assert pool.stand_in("vae_decoder") == "vae_decoder"
        infer(*pool.phase("vae_decoder"))
    assert simulated.executed == ["vae_decoder"]


def test_a_later_gpu_decodes_with_the_bf16_twin(planned, simulated) -> None:
    with pytest.raises(IncompatibleError, match="has no tensorrt plan of vae_decoder_bf16"):
        open_pool(_with_twin(planned()), "tensorrt")


def test_plans_for_every_rtx_gpu_are_refused_on_turing(planned, simulated, caplog: pytest.LogCaptureFixture) -> None:
    simulated.install("tensorrt-rtx")
    bundle = planned()
    simulated.compute_capability = (7, 5)
    with pytest.raises(
        IncompatibleError, match=r"Simulated GPU has compute capability 7\.5, and plans of TensorRT for"
    ):
        open_pool(bundle, "tensorrt-rtx")
    with caplog.at_level(logging.WARNING), open_pool(bundle) as pool:
        assert pool.provider == "ort-cpu"
    assert "the bundle's tensorrt-rtx plans are not used: " in caplog.text


def test_a_bundle_of_plans_only_cannot_fall_back(planned, simulated) -> None:
    bundle = planned(onnx=False)
    simulated.remove()
    with pytest.raises(IncompatibleError):
        open_pool(bundle)


@pytest.mark.parametrize(
    ("available", "provider"),
    [(["CPUExecutionProvider"], "ort-cpu"), (["CUDAExecutionProvider", "CPUExecutionProvider"], "ort-cuda")],
)
def test_without_plans_auto_takes_onnxruntime_s_best_provider(
    monkeypatch: pytest.MonkeyPatch, available: list[str], provider: str
) -> None:
    onnxruntime = importlib.import_module("onnxruntime")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    monkeypatch.setattr(ort_providers, "provider_problem", lambda ort, name: None)
    with open_pool(EMBEDDED) as pool:
        assert (pool.provider, pool.limits) == (provider, None)


def test_a_cuda_provider_that_cannot_start_is_a_warning_under_auto(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    onnxruntime = importlib.import_module("onnxruntime")
    available = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    problem = Problem("libcublas.so.13 is missing", "pip install it")
    monkeypatch.setattr(ort_providers, "provider_problem", lambda ort, name: problem)
    with caplog.at_level(logging.WARNING), open_pool(EMBEDDED) as pool:
        assert pool.provider == "ort-cpu"
    assert caplog.messages == [
        "continuing on the CPU: provider ort-cuda cannot start: libcublas.so.13 is missing; pip install it"
    ]


def test_errors_list_the_valid_names() -> None:
    with pytest.raises(UsageError, match="unknown provider 'cuda'; choose one of auto, ort-cpu, ort-cuda"):
        open_pool(EMBEDDED, provider="cuda")
    with pytest.raises(UsageError, match="unknown residency 'all'; choose auto, resident, swap or stream"):
        open_pool(EMBEDDED, residency="all")


def test_the_measured_memory_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for measured, policy in ((1 << 50, "resident"), (1, "swap"), (None, "resident")):
        monkeypatch.setattr(providers, "available_host_memory", lambda measured=measured: measured)
        pool = open_pool(EMBEDDED, "ort-cpu")
        assert (pool.residency, pool.provider) == (policy, "ort-cpu")


@pytest.mark.parametrize(("available", "policy"), [(1, "swap"), (0, "swap"), (1 << 50, "resident")])
def test_a_given_size_replaces_the_measured_one(monkeypatch: pytest.MonkeyPatch, available: int, policy: str) -> None:
    measured = 1 << 50 if policy == "swap" else 1
    monkeypatch.setattr(providers, "available_host_memory", lambda: measured)
    assert open_pool(EMBEDDED, "ort-cpu", available=available).residency == policy


def test_the_policies_work_on_onnxruntime() -> None:
    assert run_components(EMBEDDED.manifest, "ort-cpu") == RUN
    with open_pool(EMBEDDED, "ort-cpu", "swap") as pool:
        run(pool)
        assert (pool.swaps, pool.loads) == (1, list(RUN))
    with open_pool(EMBEDDED, "ort-cpu", "resident") as pool:
        pool.phase("unet", next_engines=("refiner_unet",))
        infer(*pool.phase("refiner_unet"))
        assert (pool.swaps, pool.loads) == (0, list(UNETS))


@pytest.fixture
def chunked(planned) -> Bundle:
    bundle: Bundle = planned(chunk=200)
    return bundle


def draw(pipeline: Pipeline, **changes: Any) -> list[Any]:
    request = {"seed": 7, "steps": 2, "handoff": 0.5, "guidance": 1.0, "width": 64, "height": 64}
    return [picture.latents for picture in pipeline.generate(Request("a star", **(request | changes)))]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the components whose plans were read, in order."""
    read: list[str] = []

    def start(bundle: Bundle, record: Any) -> Any:
        read.append(record.key.component)
        return start_reading(bundle, record)

    monkeypatch.setattr("sdxl_trt.engines.backends.trt.engine.start_reading", start)
    return read


@pytest.mark.parametrize("residency", ["resident", "swap"])
def test_every_plan_is_read_once_in_the_order_of_use(chunked, simulated, reads: list[str], residency: str) -> None:
    digests = {record.file.sha256: record.key.component for record in chunked.manifest.plans}
    with open_bundle(chunked.root, provider="tensorrt", residency=residency) as pipeline:
        first = draw(pipeline)
        assert reads == list(RUN)
        assert [digests[digest] for digest in simulated.deserialized] == list(RUN)
        np.testing.assert_array_equal(draw(pipeline), first)
        again = list(RUN) if residency == "swap" else []
        assert reads == [*RUN, *again], "a second run reads ahead again, if nothing stays loaded"
        reads.clear()
        draw(pipeline, handoff=None)
        assert "refiner_unet" not in reads, "the run does not use it"
    assert simulated.current_bytes == 0


def test_a_damaged_plan_harms_only_the_run_that_uses_it(chunked, simulated, caplog: pytest.LogCaptureFixture) -> None:
    (record,) = [record for record in chunked.manifest.plans if record.key.component == "refiner_unet"]
    path = chunked.path(record.file)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with open_bundle(chunked.root, provider="tensorrt", residency="swap") as pipeline:
        assert len(draw(pipeline, handoff=None)) == 1
        with pytest.raises(CorruptError, match=r"refiner_unet.*\.plan: the sha256 of its bytes"):
            draw(pipeline)
        assert pipeline.pool.loads[-1] == "unet"
        assert len(draw(pipeline, handoff=None)) == 1
    assert simulated.current_bytes == 0


def test_streamed_and_whole_plans_draw_the_same(chunked, monkeypatch: pytest.MonkeyPatch, simulated) -> None:
    drawn = []
    for complete in (True, False):
        monkeypatch.setattr(PlanReader, "complete", complete)
        with open_bundle(chunked.root, provider="tensorrt", residency="swap") as pipeline:
            drawn.append(draw(pipeline))
            assert pipeline.pool._reads is not None
            assert pipeline.pool._reads.peak <= pipeline.pool._reads.limit
    np.testing.assert_array_equal(*drawn)
    assert simulated.current_bytes == 0


def test_with_little_host_memory_one_plan_is_read_at_a_time(
    chunked, monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    monkeypatch.setattr("sdxl_trt.engines.residency.pool.available_host_memory", lambda: 0)
    with open_bundle(chunked.root, provider="tensorrt", residency="swap") as pipeline:
        draw(pipeline)
        plans = pipeline.pool._reads
        assert plans is not None
        assert plans.peak <= plans.limit == max(record.file.size for record in chunked.manifest.plans)
    assert reads == list(RUN)


def test_openvino_is_opened_when_it_is_asked_for_and_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even without ONNX Runtime, whose engine says which package is missing."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert providers.open_backend(EMBEDDED, "auto").provider == "ort-cpu"
    backend = providers.open_backend(EMBEDDED, "openvino", "fp32")
    assert (backend.provider, backend.computes, backend.memory()) == ("openvino", "fp32", None)
    with pytest.raises(UsageError, match="--compute-precision fp32 goes with --provider openvino"):
        providers.open_backend(EMBEDDED, "auto", "fp32")
