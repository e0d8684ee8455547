"""Cached runs against diffusers' pipelines whose UNets run whole, on deep features that hooks extrapolate."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from independent.step_caching import extrapolate

from sdxl_trt.runtime import Batch, Pipeline, Request, open_bundle

# diffusers passes torch tensors to np.array.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]
REQUIRED = 2e-5
"""The largest difference of latents, in standard deviations of the reference's."""
SEEN = 1e-4
"""What the cache changes at least: small random UNets change little from step to step."""
PROMPT, NEGATIVE, SEED, SIDE, STEPS = "a red fox in the snow", "blurry", 11, 32, 12
FIRST = {"base": 4, "refiner": 2}


@dataclass(frozen=True)
class Case:
    """A sampler, diffusers' scheduler for it, and how often it has the UNet called in a step."""

    sampler: str
    scheduler: str
    handoff: float | None = 0.5
    calls: int = 1
    guidance: float = 5.0
    every: tuple[int, int] = (2, 2)
    schedule: str = "leading"
    reach: float = 1.0

    def __str__(self) -> str:
        return f"{self.sampler}-{self.handoff}-{self.guidance}-{self.every}-{self.schedule}"


CASES = [
    Case("euler", "EulerDiscreteScheduler"),
    Case("euler", "EulerDiscreteScheduler", guidance=1.0, every=(3, 2)),
    Case("euler", "EulerDiscreteScheduler", every=(1, 2)),
    Case("euler", "EulerDiscreteScheduler", every=(2, 1)),
    Case("euler_ancestral", "EulerAncestralDiscreteScheduler", reach=0.0),
    Case("dpmpp_2m", "DPMSolverMultistepScheduler", reach=0.5),
    Case("dpmpp_2m", "DPMSolverMultistepScheduler", schedule="leading+karras", every=(3, 3), reach=0.5),
    # diffusers cuts within a step of two calls.
    Case("heun", "HeunDiscreteScheduler", None, calls=2),
    Case("heun", "HeunDiscreteScheduler", None, calls=2, every=(3, 3)),
]


class Experts:
    """diffusers' pipelines of a pair."""

    def __init__(self, pair: Any) -> None:
        from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.base = StableDiffusionXLPipeline.from_pretrained(pair.base)
            self.refiner = StableDiffusionXLImg2ImgPipeline.from_pretrained(pair.refiner)
        for pipeline in (self.base, self.refiner):
            pipeline.set_progress_bar_config(disable=True)

    def run(self, case: Case, count: int) -> np.ndarray:
        """Return the last latents of a cached run."""
        import diffusers
        import torch

        generators = [torch.Generator().manual_seed(SEED + i) for i in range(count)]
        shared = {"prompt": [PROMPT] * count, "negative_prompt": [NEGATIVE] * count, "generator": generators,
                  "num_inference_steps": STEPS, "guidance_scale": case.guidance, "output_type": "latent"}  # fmt: skip
        end = {} if case.handoff is None else {"denoising_end": case.handoff}
        latents: Any = None
        for name, pipe, every in (("base", self.base, case.every[0]), ("refiner", self.refiner, case.every[1])):
            if name == "refiner" and case.handoff is None:
                break
            spacing, _, transform = case.schedule.partition("+")
            config = {key: value for key, value in pipe.scheduler.config.items() if key[0] != "_"}
            config |= {"timestep_spacing": spacing, "use_karras_sigmas": bool(transform)}
            kind = getattr(diffusers, case.scheduler)
            pipe.scheduler = kind.from_config({key: value for key, value in config.items() if key != "algorithm_type"})
            stop = extrapolate(pipe, every=every, first=FIRST[name], calls=case.calls, reach=case.reach)
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                own = {"width": SIDE, "height": SIDE, **end} if name == "base" else {
                    "image": latents, "denoising_start": case.handoff}  # fmt: skip
                latents = pipe(**shared, **own).images
            stop()
        found: np.ndarray = latents.numpy()
        return found


@pytest.fixture(scope="module")
def experts(pairs: Callable[[str], Any]) -> Experts:
    return Experts(pairs("outline"))


@pytest.fixture(scope="module")
def opened(pairs: Callable[[str], Any]) -> Iterator[Pipeline]:
    with open_bundle(pairs("outline").bundle, residency="resident") as pipeline:
        yield pipeline


def _request(case: Case, **changes: Any) -> Request:
    settings: dict[str, Any] = {
        "negative": NEGATIVE, "steps": STEPS, "handoff": case.handoff, "seed": SEED, "guidance": case.guidance,
        "sampler": case.sampler, "schedule": case.schedule, "width": SIDE, "height": SIDE, "cache": case.every[0],
        "refiner_cache": case.every[1],
    }  # fmt: skip
    return Request(PROMPT, **settings | changes)


def _final(pipeline: Pipeline, request: Request) -> np.ndarray:
    list(pipeline.generate(request))
    assert pipeline.run is not None
    return pipeline.run.final


def _difference(found: np.ndarray, reference: np.ndarray) -> float:
    assert found.shape == reference.shape
    return float(np.abs(found - reference).max() / reference.std())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_cached_run_is_diffusers_run_on_extrapolated_features(case: Case, opened: Pipeline, experts: Experts) -> None:
    found = _final(opened, _request(case, count=2))
    assert _difference(found, experts.run(case, 2)) <= REQUIRED
    assert _difference(found, _final(opened, _request(case, count=2, cache=1, refiner_cache=1))) > SEEN, "no effect"


@pytest.mark.parametrize("case", [CASES[0], CASES[-1]], ids=str)
def test_a_picture_is_the_same_in_any_group(case: Case, opened: Pipeline) -> None:
    """Each group extrapolates the features of its own pictures."""
    together = _final(Pipeline(opened.pool, pictures_at_once=2), _request(case, count=3))
    for number in range(3):
        alone = _final(opened, _request(case, seed=SEED + number))
        assert _difference(together[number], alone[0]) <= REQUIRED


def test_requests_that_share_a_base_run_equal_single_runs(opened: Pipeline) -> None:
    """Which steps are full does not depend on where the base stops."""
    requests = [_request(CASES[0], handoff=handoff, refiner_cache=every) for handoff, every in
                ((0.5, 1), (0.4, 2), (None, 1), (0.7, 2))]  # fmt: skip
    batch = Batch(opened, requests)
    taken = sum(step.stage == "base" for _, step in batch.steps())
    assert taken == STEPS, "the base run is shared"
    for request, run in zip(requests, batch.runs, strict=True):
        np.testing.assert_array_equal(run.final, _final(opened, request))
        assert opened.run is not None
        assert run.full_steps == opened.run.full_steps


def test_an_interval_of_one_is_the_run_without_a_cache(opened: Pipeline) -> None:
    request = _request(CASES[0])
    plain = replace(request, cache=1, refiner_cache=None)
    np.testing.assert_array_equal(_final(opened, replace(request, cache=1, refiner_cache=1)), _final(opened, plain))
    assert not opened.run.request.caches  # type: ignore[union-attr]
