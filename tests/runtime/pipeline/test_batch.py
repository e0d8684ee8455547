"""Requests that run together: the same pictures as in separate runs, with fewer calls."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime import Request, open_bundle
from sdxl_trt.runtime.diffusion.samplers.registry import TWO_CALLS, sampler_names
from sdxl_trt.runtime.pipeline.batch import KNOWS_ITS_END_COMFYUI, Batch
from sdxl_trt.runtime.pipeline.pipeline import Pipeline
from sdxl_trt.runtime.pipeline.sweep import Sweep, parse_axis
from sdxl_trt.runtime.request.side import Side

pytestmark = pytest.mark.slow

SMALL = Request("a red fox", steps=4, width=32, height=32, seed=5, guidance=1.0)


@pytest.fixture(scope="module")
def pipeline(pairs: Callable[[str], Any]) -> Iterator[Pipeline]:
    with open_bundle(pairs("outline").bundle, residency="resident") as opened:
        yield opened


@pytest.fixture
def calls(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Return a counter of the calls of every engine from now on."""
    counted: Counter[str] = Counter()
    phase = pipeline.pool.phase
    watched: set[str] = set()

    def watching(*names: str, next_engines: tuple[str, ...] = ()) -> tuple[Any, ...]:
        engines = phase(*names, next_engines=next_engines)
        for name, engine in zip(names, engines, strict=True):
            if name not in watched:
                watched.add(name)
                monkeypatch.setattr(engine, "infer", _counting(counted, name, engine.infer))
        return engines

    monkeypatch.setattr(pipeline.pool, "phase", watching)
    return counted


def _counting(counted: Counter[str], name: str, infer: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*arguments: Any) -> Any:
        counted[name] += 1
        return infer(*arguments)

    return wrapped


def _separately(pipeline: Pipeline, request: Request) -> np.ndarray:
    list(pipeline.generate(request))
    assert pipeline.run is not None
    return pipeline.run.final


def _together(pipeline: Pipeline, requests: list[Request]) -> list[np.ndarray]:
    batch = Batch(pipeline, requests)
    list(batch.steps())
    return [run.final for run in batch.runs]


@pytest.mark.parametrize("sampler", sampler_names())
def test_handoffs_of_one_base_run_equal_separate_runs(pipeline: Pipeline, calls: Counter[str], sampler: str) -> None:
    cuts = [replace(SMALL, sampler=sampler, handoff_step=cut) for cut in (1, 3)]
    requests = [cuts[0], replace(SMALL, sampler=sampler, handoff=None), cuts[1]]
    found = _together(pipeline, requests)
    grid = pipeline.start(requests[1]).run.request.schedule.sigmas
    twice = int(np.count_nonzero(grid[1:])) if sampler in TWO_CALLS else 0
    assert calls["unet"] == 4 + twice
    for request, latents in zip(requests, found, strict=True):
        np.testing.assert_array_equal(latents, _separately(pipeline, request))


@pytest.mark.parametrize(
    ("sampler", "leftover"),
    [("euler", None), ("euler", False), ("euler_ancestral", None), ("dpmpp_sde", None), ("dpmpp_2m_sde", None),
     ("lms", None), ("dpmpp_2m", None), ("uni_pc", None), ("uni_pc_bh2", None), ("deis", None),
     ("res_multistep", False)],
)  # fmt: skip
def test_handoffs_in_comfyui_mode_equal_separate_runs(pipeline: Pipeline, sampler: str, leftover: bool | None) -> None:
    way = replace(SMALL, compat="comfyui", sampler=sampler, leftover_noise=leftover)
    requests = [replace(way, handoff_step=2), replace(way, handoff_step=3)]
    for request, latents in zip(requests, _together(pipeline, requests), strict=True):
        np.testing.assert_array_equal(latents, _separately(pipeline, request))


def test_sharing_a_sampler_that_depends_on_its_end_fails(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "uni_pc" in KNOWS_ITS_END_COMFYUI
    monkeypatch.setattr("sdxl_trt.runtime.pipeline.batch.KNOWS_ITS_END_COMFYUI", frozenset())
    way = replace(SMALL, compat="comfyui", sampler="uni_pc", steps=6)
    requests = [replace(way, handoff_step=4), replace(way, handoff=None)]
    found = _together(pipeline, requests)
    assert not np.array_equal(found[0], _separately(pipeline, requests[0]))


def test_the_bundles_own_sampler_is_treated_as_requested(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    base = pipeline.manifest.base
    recorded = msgspec.structs.replace(base, scheduler=msgspec.structs.replace(base.scheduler, sampler="deis"))
    monkeypatch.setattr(pipeline, "manifest", msgspec.structs.replace(pipeline.manifest, base=recorded))
    requests = [replace(SMALL, handoff_step=3), replace(SMALL, handoff=None)]
    for request, latents in zip(requests, _together(pipeline, requests), strict=True):
        np.testing.assert_array_equal(latents, _separately(pipeline, request))


def test_six_handoffs_cost_one_base_run_and_their_refiner_steps(pipeline: Pipeline, calls: Counter[str]) -> None:
    handoffs = (0.25, 0.5, 0.6, 0.7, 0.8, None)
    requests = [replace(SMALL, steps=10, handoff=handoff) for handoff in handoffs]
    batch = Batch(pipeline, requests)
    list(batch.steps())
    parts = sum(10 - run.request.cut for run in batch.runs)
    assert 0 < parts == calls["refiner_unet"]
    assert calls["unet"] == 10
    assert calls["unet"] + calls["refiner_unet"] <= 1.1 * (10 + parts)


def test_a_caller_that_changes_a_step_does_not_change_requests_that_share_it(pipeline: Pipeline) -> None:
    requests = [replace(SMALL, sampler="dpmpp_2m", handoff_step=cut) for cut in (1, 2, 3)]
    batch = Batch(pipeline, requests)
    for _, step in batch.steps():
        if step.latents is not None:
            step.latents.fill(np.nan)
    for request, run in zip(requests, batch.runs, strict=True):
        np.testing.assert_array_equal(run.final, _separately(pipeline, request))


SIDES = (Side(text="a red fox", text_2="a red fox", aesthetic_score=6.0), Side(text="", text_2=""))
OF_A_WORKFLOW = replace(
    SMALL, compat="comfyui", count=1, base_end_step=2, leftover_noise=True, base_sides=SIDES, refiner_start_step=2,
    refiner_end_step=10_000, refiner_guidance=1.0, refiner_sampler="euler_ancestral", refiner_seed=9,
    refiner_sides=SIDES,
)  # fmt: skip


def test_variants_of_a_workflow_share_its_base_run(pipeline: Pipeline, calls: Counter[str]) -> None:
    requests = [*Sweep(OF_A_WORKFLOW, [parse_axis("handoff-step=1,3,none")]).requests,
                *Sweep(OF_A_WORKFLOW, [parse_axis("aesthetic-score=4")]).requests,
                replace(OF_A_WORKFLOW, refiner_seed=10)]  # fmt: skip
    found = _together(pipeline, requests)
    assert (calls["unet"], calls["refiner_unet"]) == (4, 3 + 1 + 2 + 2)
    for request, latents in zip(requests, found, strict=True):
        np.testing.assert_array_equal(latents, _separately(pipeline, request))
    assert not np.array_equal(found[3], found[4])


def test_a_base_that_leaves_no_noise_is_not_shared(pipeline: Pipeline, calls: Counter[str]) -> None:
    alone = replace(SMALL, handoff=None)
    requests = [replace(alone, base_end_step=2), alone]
    found = _together(pipeline, requests)
    assert calls["unet"] == 2 + 4
    for request, latents in zip(requests, found, strict=True):
        np.testing.assert_array_equal(latents, _separately(pipeline, request))


def test_scores_share_the_whole_base_run(pipeline: Pipeline, calls: Counter[str]) -> None:
    requests = [replace(SMALL, guidance=3.0, aesthetic_score=score, handoff_step=2) for score in (4.0, 6.0, 8.0)]
    first, *others = _together(pipeline, requests)
    assert (calls["unet"], calls["refiner_unet"]) == (2, 6)
    assert calls["text_encoder"] == calls["text_encoder_2"] == 1
    assert not any(np.array_equal(first, other) for other in others)
    np.testing.assert_array_equal(others[1], _separately(pipeline, requests[2]))


@pytest.mark.parametrize(
    "change", [{"seed": 6}, {"steps": 5}, {"guidance": 2.0}, {"prompt": "a blue star"}, {"schedule": "trailing"}]
)
def test_another_base_run_is_not_shared(pipeline: Pipeline, change: dict[str, Any]) -> None:
    requests = [replace(SMALL, handoff_step=2), replace(SMALL, handoff_step=3, **change)]
    for request, latents in zip(requests, _together(pipeline, requests), strict=True):
        np.testing.assert_array_equal(latents, _separately(pipeline, request))


def test_a_batch_is_phase_major_with_one_change_of_experts(pairs: Callable[[str], Any]) -> None:
    with open_bundle(pairs("outline").bundle, residency="swap") as pipeline:
        requests = [replace(SMALL, prompt=prompt, count=2) for prompt in ("a red fox", "a blue star", "the snow")]
        done = list(Batch(pipeline, requests).steps())
        assert (pipeline.pool.swaps, pipeline.pool.loads.count("text_encoder")) == (1, 1)
    stages = [step.stage for _, step in done if step.stage != "load"]
    assert list(dict.fromkeys(stages)) == ["encode", "base", "refiner", "decode"]
    for stage in ("base", "refiner", "decode"):
        counted = [(step.index, step.total) for _, step in done if step.stage == stage]
        assert [index for index, _ in counted] == list(range(1, len(counted) + 1))
        assert {total for _, total in counted} == {len(counted)}
    assert [number for number, step in done if step.picture] == [0, 0, 1, 1, 2, 2]


def test_an_invalid_request_stops_a_batch_before_anything_is_loaded(pairs: Callable[[str], Any]) -> None:
    with open_bundle(pairs("outline").bundle) as pipeline:
        with pytest.raises(UsageError, match="handoff-step"):
            Batch(pipeline, [SMALL, replace(SMALL, handoff_step=99)])
        assert pipeline.pool.loads == []
