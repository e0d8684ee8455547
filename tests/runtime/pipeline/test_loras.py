"""LoRAs of a request on their way to the engines: which components get them, how often these are loaded, and reuse.

The engines are stand-ins whose outputs depend on their component and on the LoRAs they were loaded with.
"""

import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdxl_trt.engines.adapters.file import Lora
from sdxl_trt.engines.adapters.kinds import Branch
from sdxl_trt.engines.adapters.names import COMPONENTS, LoraComponent, Place
from sdxl_trt.engines.adapters.scaled import ScaledLora
from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.engines.engine import Array, numpy_dtype
from sdxl_trt.engines.residency.pool import EnginePool
from sdxl_trt.mini.embedded import bundle_path
from sdxl_trt.runtime import Pipeline, Request
from sdxl_trt.runtime.pipeline.batch import Batch
from sdxl_trt.runtime.pipeline.run import Job
from sdxl_trt.runtime.request import resolve
from sdxl_trt.runtime.request.loras import StageLoras

SMALL = Request("plain", seed=1, steps=4, width=64, height=64, handoff=0.5)
ENCODE = ["text_encoder", "text_encoder_2"]
UNETS = ("unet", "refiner_unet")


def _lora(letter: str, *components: LoraComponent) -> Lora:
    branches = {each: (Branch(Place(each, "a", ""), "difference", {}),) for each in components or COMPONENTS}
    return Lora(Path(f"{letter}.safetensors"), letter * 64, branches)


A, B = ScaledLora(_lora("a"), 0.5), ScaledLora(_lora("b"), 0.7)
UNET_ALONE = ScaledLora(_lora("c", "unet"), 1.0)
LORAS: dict[str, dict[str, tuple[ScaledLora, ...]]] = {
    "plain": {}, "a": {"base": (A,)}, "b": {"base": (B,)}, "ab": {"base": (A, B)}, "unet": {"base": (UNET_ALONE,)},
    "refiner": {"refiner": (A,)}, "both": {"base": (A,), "refiner": (A,)},
}  # fmt: skip


class StandIn:
    """An engine whose outputs are its inputs' sum, and a number of its component and LoRAs."""

    def __init__(self, name: str, loaded: list[str]) -> None:
        self.component = read_bundle(bundle_path()).manifest.components[name]
        self._name, self._loaded, self._held = name, loaded, False
        self._loras: tuple[ScaledLora, ...] = ()
        self._constants: dict[str, Array] = {}

    def adapt(self, loras: Sequence[ScaledLora]) -> None:
        if tuple(loras) != self._loras:
            self.unload()
        self._loras = tuple(loras)

    def prefetch(self) -> None: ...

    def load(self) -> None:
        assert self._name not in self._loaded
        self._loaded.append(self._name)
        self._held = True
        assert sum(name in UNETS for name in self._loaded) <= 2

    def reserve(self, nbytes: int) -> None: ...

    def bind(self, constants: Mapping[str, Array]) -> None:
        self._constants = dict(constants)

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        feed = {name: array[: len(next(iter(inputs.values())))] for name, array in self._constants.items()} | inputs
        axes = {axis: size for spec in self.component.inputs
                for axis, size in zip(spec.shape, feed[spec.name].shape, strict=True)}  # fmt: skip
        worn = zlib.crc32(repr([self._name, [(each.lora.sha256[0], each.scale) for each in self._loras]]).encode())
        value = worn % 1000 / 1e3 + sum(float(np.abs(array).mean()) for array in feed.values()) / 1e4
        if "input_ids" in feed:
            value = worn % 1000 / 1e3  # all prompts are equal to these encoders
        made = {}
        for spec in self.component.outputs:
            shape = [_size(axis, axes) for axis in spec.shape]
            made[spec.name] = np.full(shape, value).astype(numpy_dtype(spec))
        return {name: made[name] for name in outputs or made}

    def unload(self) -> None:
        if self._held:
            self._loaded.remove(self._name)
            self._held = False


def _size(axis: int | str, axes: Mapping[Any, int]) -> int:
    if isinstance(axis, int):
        return axis
    found = re.fullmatch(r"(?:(\d+)\*)?(\w+?)(?:/(\d+))?", axis)
    assert found is not None
    return axes[found[2]] * int(found[1] or 1) // int(found[3] or 1)


@pytest.fixture(autouse=True)
def _asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each request the LoRAs that LORAS lists for its prompt."""
    monkeypatch.setattr(resolve, "settled_loras", lambda request, *_: StageLoras(LORAS[request.prompt]))


@pytest.fixture
def opened() -> Iterator[Callable[..., Pipeline]]:
    pipelines = []

    def make(residency: Any = "resident") -> Pipeline:
        loaded: list[str] = []
        pool = EnginePool(read_bundle(bundle_path()), lambda name: StandIn(name, loaded), residency, "ort-cpu")
        pipelines.append(Pipeline(pool))
        return pipelines[-1]

    yield make
    for pipeline in pipelines:
        pipeline.pool.close()


def _run(pipeline: Pipeline, prompt: str, **changes: Any) -> tuple[Job, list[str]]:
    """Return the job of a run, and the components that it loaded."""
    before, job = len(pipeline.pool.loads), pipeline.start(replace(SMALL, prompt=prompt, **changes))
    for _ in pipeline._work(job):
        pass
    return job, pipeline.pool.loads[before:]


def _embeds(job: Job, stage: Any) -> np.ndarray:
    return job.embeds[stage][0][0].hidden


def test_the_base_gets_its_loras_and_the_refiner_stays_as_it_is(opened: Callable[..., Pipeline]) -> None:
    pipeline = opened()
    plain, _ = _run(pipeline, "plain")
    other, loads = _run(pipeline, "a")
    # The shared encoder runs for the refiner first, without the LoRA, as it is loaded.
    assert loads == [*ENCODE, "unet"]
    assert not np.array_equal(_embeds(plain, "base"), _embeds(other, "base"))
    np.testing.assert_array_equal(_embeds(plain, "refiner"), _embeds(other, "refiner"))
    assert other.run.handoff_latents is not None
    assert not np.array_equal(plain.run.handoff_latents, other.run.handoff_latents)


def test_the_refiner_gets_loras_of_its_own(opened: Callable[..., Pipeline]) -> None:
    pipeline = opened()
    plain, _ = _run(pipeline, "plain")
    other, loads = _run(pipeline, "refiner")
    assert loads == ["text_encoder_2", "refiner_unet"]
    np.testing.assert_array_equal(plain.run.handoff_latents, other.run.handoff_latents)
    assert not np.array_equal(plain.run.final, other.run.final)


@pytest.mark.parametrize("residency", ["resident", "swap"])
def test_off_again_every_latent_is_as_before(opened: Callable[..., Pipeline], residency: str) -> None:
    pipeline = opened(residency)
    finals = [_run(pipeline, prompt)[0].run.final for prompt in ("plain", "ab", "plain", "a", "both", "plain")]
    np.testing.assert_array_equal(finals[0], finals[2])
    np.testing.assert_array_equal(finals[0], finals[5])
    assert not np.array_equal(finals[1], finals[3])
    np.testing.assert_array_equal(_run(opened("resident"), "ab")[0].run.final, finals[1])


def test_a_repeated_request_reloads_only_the_encoder_that_base_and_refiner_share(
    opened: Callable[..., Pipeline],
) -> None:
    pipeline = opened()
    _run(pipeline, "a")
    assert [_run(pipeline, "a")[1] for _ in range(3)] == [["text_encoder_2"]] * 3
    assert _run(pipeline, "both")[1] in (["refiner_unet"], ["text_encoder_2", "refiner_unet"])
    assert _run(pipeline, "both")[1] == []


def test_a_lora_of_the_unet_alone_leaves_the_encoders_loaded(opened: Callable[..., Pipeline]) -> None:
    pipeline = opened()
    _run(pipeline, "plain")
    assert _run(pipeline, "unet")[1] == ["unet"]
    assert _run(pipeline, "plain")[1] == ["unet"]


def test_the_pool_is_told_of_components_with_their_loras(
    opened: Callable[..., Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = opened()
    told: list[Any] = []
    monkeypatch.setattr(pipeline.pool, "expect", told.extend)
    pipeline.expect([pipeline.start(replace(SMALL, prompt="a"))])
    assert [getattr(use, "component", use) for use in told] == [
        *ENCODE, "text_encoder_2", "unet", "refiner_unet", "vae_decoder",
    ]  # fmt: skip
    assert [getattr(use, "loras", ()) for use in told] == [(A,), (A,), (), (A,), (), ()]


def test_a_batch_of_several_sets_equals_separate_runs_and_loads_each_set_once(opened: Callable[..., Pipeline]) -> None:
    prompts = ["a", "plain", "b", "a", "plain"]
    pipeline = opened()
    batch = Batch(pipeline, [replace(SMALL, prompt=prompt, seed=seed) for seed, prompt in enumerate(prompts)])
    for _ in batch.steps():
        pass
    assert pipeline.pool.loads.count("unet") == 3
    assert pipeline.pool.loads.count("refiner_unet") == 1
    assert pipeline.pool.loads.count("text_encoder") == 3
    for seed, (prompt, run) in enumerate(zip(prompts, batch.runs, strict=True)):
        alone, _ = _run(opened(), prompt, seed=seed)
        np.testing.assert_array_equal(run.final, alone.run.final)


def test_requests_share_a_base_run_only_with_equal_loras(
    opened: Callable[..., Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LORAS, "plain", {})
    batch = Batch(opened(), [replace(SMALL, handoff=handoff) for handoff in (0.5, 0.75)])
    assert len(batch._groups) == 1
    sets = iter([{"base": (A,)}, {"base": (replace(A, scale=0.6),)}, {"base": (A,), "refiner": (B,)}])
    monkeypatch.setattr(resolve, "settled_loras", lambda *_: StageLoras(next(sets)))
    batch = Batch(opened(), [replace(SMALL, handoff=handoff) for handoff in (0.5, 0.75, 0.8)])
    assert sorted(map(sorted, batch._groups.values())) == [[0, 2], [1]]
