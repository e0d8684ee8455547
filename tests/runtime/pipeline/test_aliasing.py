"""Memory ownership in the pipeline: each test writes to memory that the writer must own alone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.engines.bundle.manifest import TensorSpec
from sdxl_trt.engines.engine import Array
from sdxl_trt.engines.residency.pool import EnginePool
from sdxl_trt.mini.embedded import bundle_path
from sdxl_trt.runtime.diffusion.conditioning import make_conditions
from sdxl_trt.runtime.diffusion.denoiser import Denoiser
from sdxl_trt.runtime.diffusion.noise.sources import BatchNoise, NoiseSource, PictureNoise
from sdxl_trt.runtime.diffusion.samplers.registry import COMFYUI, Ask, bind_sampler, brownian_span, drive, sampler_names
from sdxl_trt.runtime.pipeline import denoising
from sdxl_trt.runtime.pipeline.pipeline import Pipeline
from sdxl_trt.runtime.pipeline.record import finish
from sdxl_trt.runtime.pipeline.run import Job, Step
from sdxl_trt.runtime.request.request import Request
from sdxl_trt.runtime.text.encoder import PromptEmbeds

ALL = [(name, False) for name in sampler_names()] + [(name, True) for name in COMFYUI]
EMBEDS = PromptEmbeds(np.zeros((77, 112), np.float32), np.zeros(64, np.float32))
SIDE, STEPS = 64, 4


class ToyEngine:
    """Returns a smooth function of its inputs, in memory that the caller owns."""

    component = SimpleNamespace(input=lambda name: TensorSpec(name=name, dtype="float32", shape=("rows",)))

    def prefetch(self) -> None: ...

    def load(self) -> None: ...

    def bind(self, constants: Mapping[str, Array]) -> None: ...

    def adapt(self, loras: Any) -> None: ...

    def unload(self) -> None: ...

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        sample, timestep = inputs["sample"], inputs["timestep"][:, None, None, None]
        return {"out_sample": np.tanh(sample) + 0.2 * sample[..., ::-1] + 0.1 * np.sin(timestep / 30)}


@pytest.fixture(scope="module")
def toy() -> Pipeline:
    """A pipeline of the embedded bundle with a toy UNet, for two pictures at once."""
    return Pipeline(EnginePool(read_bundle(bundle_path()), lambda _: ToyEngine(), "resident", "none"),
                    pictures_at_once=2)  # fmt: skip


def _start(toy: Pipeline, sampler: str = "euler", **settings: Any) -> Job:
    asked: dict[str, Any] = {"steps": STEPS, "seed": 7, "handoff": None, "width": SIDE, "height": SIDE, "count": 3}
    job = toy.start(Request("", sampler=sampler, **asked | settings))
    job.embeds = {"base": (EMBEDS, EMBEDS)}
    return job


def _steps(toy: Pipeline, job: Job) -> Iterator[Step]:
    return (step for step in toy.base(job, next_engine="unet") if step.stage == "base")


def _by_hand(toy: Pipeline, job: Job, group: slice, *, comfyui: bool) -> Iterator[np.ndarray]:
    """Yield the latents of the sampler of `job`, called directly on a group of its pictures."""
    request, stage, engine = job.run.request, toy.manifest.base, ToyEngine()
    guidance, schedule, start = request.guidance_of("base"), request.schedule, job.latents[group].copy()
    micro = request.sides["base"][0].micro
    conditions = make_conditions(engine, stage, EMBEDS, EMBEDS, micro, guidance.scale, len(start), comfyui_rule=comfyui)
    denoise = Denoiser(engine, schedule, conditions, stage.scheduler.prediction_type, guidance)
    span = brownian_span(request.request.sampler, schedule.sigmas, schedule.sigmas, comfyui=comfyui)
    noise = deepcopy(job.noises["base"]).source(start.shape[1:], group, span)
    return drive(bind_sampler(request.request.sampler, noise, comfyui=comfyui)(start, schedule.sigmas), denoise)


@pytest.mark.parametrize(("name", "comfyui"), ALL)
def test_a_run_is_the_sampler_called_by_hand(name: str, comfyui: bool, toy: Pipeline) -> None:
    job = _start(toy, name, compat="comfyui" if comfyui else "diffusers")
    groups = (slice(0, 2), slice(2, 3))
    expected = [x.copy() for group in groups for x in _by_hand(toy, job, group, comfyui=comfyui)]
    found = [step.latents for step in _steps(toy, job)]
    assert len(found) == 2 * STEPS
    for x, reference in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x, reference)
    np.testing.assert_array_equal(job.latents, np.concatenate([expected[STEPS - 1], expected[-1]]))


@pytest.mark.parametrize("name", sampler_names())
def test_a_caller_that_changes_a_steps_latents_does_not_change_the_run(name: str, toy: Pipeline) -> None:
    calm = _start(toy, name)
    kept = [(step.latents, step.denoised) for step in _steps(toy, calm)]
    job = _start(toy, name)
    for step, (latents, denoised) in zip(_steps(toy, job), kept, strict=True):
        np.testing.assert_array_equal(step.latents, latents)
        np.testing.assert_array_equal(step.denoised, denoised, "a step's arrays stay unchanged")
        step.latents.fill(np.nan)
        with pytest.raises(ValueError, match="read-only"):
            step.denoised.fill(np.nan)
    np.testing.assert_array_equal(job.latents, calm.latents)


def test_a_sampler_may_change_every_array_that_it_gets(toy: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps and overwrites its start, continues from what it yielded, and overwrites estimates and noise."""

    starts = []

    def bind(name: str, noise: Callable[[float, float], np.ndarray], **_: Any) -> Any:
        def sample(x: np.ndarray, sigmas: np.ndarray) -> Any:
            start, kept = x, x.copy()
            starts.append(start)
            for sigma, after in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
                np.testing.assert_array_equal(start, kept)
                drawn, denoised = noise(sigma, after), (yield Ask(x, sigma))
                x = x + 0.1 * denoised + 0.1 * drawn
                yield x
                drawn.fill(np.nan)
                denoised.fill(np.nan)
            start.fill(np.nan)

        return sample

    monkeypatch.setattr(denoising, "bind_sampler", bind)
    given = np.random.default_rng(1).standard_normal((3, 4, SIDE // 8, SIDE // 8), dtype=np.float32)
    before = given.copy()
    given.flags.writeable = False
    job = _start(toy, latents=given)
    steps = list(_steps(toy, job))
    assert (len(starts), len(steps)) == (2, 2 * STEPS)
    assert not any(np.shares_memory(start, job.latents) for start in starts)
    assert np.isfinite(job.latents).all()
    for step in steps:
        assert np.isfinite(step.latents).all()
    np.testing.assert_array_equal(given, before)
    np.testing.assert_array_equal(job.run.initial, before)


def test_a_requests_latents_still_belong_to_the_caller(toy: Pipeline) -> None:
    given = np.random.default_rng(1).standard_normal((3, 4, SIDE // 8, SIDE // 8), dtype=np.float32)
    before = given.copy()
    job = _start(toy, latents=given)
    for array in (job.latents, job.run.initial, job.run.final):
        assert not np.shares_memory(array, given)
    given.fill(np.nan)
    assert all(np.isfinite(step.latents).all() for step in _steps(toy, job))
    np.testing.assert_array_equal(job.run.initial, before)


def test_a_finished_picture_owns_its_latents(toy: Pipeline) -> None:
    run = _start(toy).run
    picture = finish(run, 1, np.zeros((SIDE, SIDE, 3), np.uint8))
    picture.latents.fill(np.nan)
    assert np.isfinite(run.final).all()


@pytest.mark.parametrize("span", [None, (0.03, 14.0)])
@pytest.mark.parametrize("make", [lambda: PictureNoise([3, 4]), lambda: BatchNoise(3, 2)])
def test_the_caller_may_change_drawn_noise(make: Callable[[], NoiseSource], span: Any) -> None:
    sources = [make().source((4, 4, 4), slice(0, 2), span) for _ in range(2)]
    ways = [(9.0, 4.0), (14.0, 0.03), (2.0, 2.0)]
    for way in ways:
        spoiled, expected = (source(*way) for source in sources)
        np.testing.assert_array_equal(spoiled, expected)
        spoiled.fill(np.nan)
