"""Requests that share calls of a UNet: each picture is as alone, with fewer calls."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_trt.engines.bundle import Range, Workload
from sdxl_trt.engines.bundle.profile import Profile
from sdxl_trt.engines.errors import CorruptError, UsageError
from sdxl_trt.engines.plans import PlanLimits
from sdxl_trt.runtime import Pipeline, Request, Shared, Step, open_bundle
from sdxl_trt.runtime.pipeline.run import Job
from sdxl_trt.runtime.request.side import Side

SIDE, ROWS = 64, 6
Calls = dict[str, list[int]]
"""The rows of every call of each UNet."""
FIRST = Request("a red star", steps=3, width=SIDE, height=SIDE, seed=5, handoff_step=2, guidance=4.0)
FOUR = (
    FIRST,
    replace(FIRST, prompt="two blue circles", seed=6, guidance=7.0, guidance_rescale=0.3),
    replace(FIRST, prompt="a square", negative="green", seed=7, aesthetic_score=3.0),
    replace(FIRST, seed=8, guidance_interval=(0.0, 0.5), refiner_guidance=2.0, prediction_type="v_prediction"),
)
"""Prompts, seeds, scales, scores, guided steps and predictions that differ by row."""


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Pipeline]:
    with open_bundle(provider="ort-cpu", residency="resident") as opened:
        yield opened


@pytest.fixture
def calls(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Calls:
    rows: Calls = {"unet": [], "refiner_unet": []}
    for name, engine in zip(rows, pipeline.pool.phase(*rows), strict=True):

        def counted(inputs: Mapping[str, Any], infer: Any = engine.infer, name: str = name) -> Any:
            rows[name].append(len(inputs["sample"]))
            return infer(inputs)

        monkeypatch.setattr(engine, "infer", counted)
    return rows


def _started(pipeline: Pipeline, requests: Sequence[Request]) -> list[Job]:
    jobs = [pipeline.start(request) for request in requests]
    list(pipeline.pictures(jobs))
    list(pipeline.encode(jobs))
    return jobs


def _share(pipeline: Pipeline, requests: Sequence[Request], rows: int | None = ROWS) -> list[np.ndarray]:
    """Return the last latents of each request, which take all their steps together."""
    jobs = _started(pipeline, requests)
    for stage in ("base", "refiner"):
        shared = Shared(pipeline, stage, jobs, rows=rows)
        list(shared.steps())
        assert not shared.failed
    return [job.final() for job in jobs]


def _alone(pipeline: Pipeline, request: Request) -> list[Step]:
    """Return the steps of a run of its own, up to the decoder."""
    (job,) = _started(pipeline, [request])
    pipeline.run = job.run
    steps = [*pipeline.base(job), *pipeline.refine(job)]
    job.run.final = job.final()
    return steps


def _close(found: np.ndarray, expected: np.ndarray) -> bool:
    """Return whether the latents agree to 50 dB."""
    return bool(np.mean((found - expected) ** 2) <= np.ptp(expected) ** 2 * 1e-5)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_sde"])
def test_four_requests_in_calls_of_fixed_rows_have_the_bits_of_each_alone(
    pipeline: Pipeline, calls: Calls, sampler: str
) -> None:
    requests = [replace(each, sampler=sampler) for each in FOUR]
    found = _share(pipeline, requests)
    shared = {name: len(rows) for name, rows in calls.items()}
    for request, latents in zip(requests, found, strict=True):
        np.testing.assert_array_equal(latents, _share(pipeline, [request])[0])
    assert {row for rows in calls.values() for row in rows} == {ROWS}
    for name, rows in calls.items():
        assert shared[name] <= (len(rows) - shared[name]) / 2, "three guided requests share a call of six rows"
    assert all(_apart(one, other) for one in found for other in found if one is not other)


def _apart(one: np.ndarray, other: np.ndarray) -> bool:
    return not _close(one, other)


@pytest.mark.parametrize("compat", ["diffusers", "comfyui"])
def test_without_fixed_rows_pictures_and_steps_are_those_of_the_lone_run(
    pipeline: Pipeline, calls: Calls, compat: str
) -> None:
    sides = (Side(text="a star", text_2="a star", combined=(Side(text="a ring", text_2="a ring"),)),
             Side(text="", text_2=""))  # fmt: skip
    others = replace(FOUR[1], count=2), replace(FOUR[2], base_sides=sides if compat == "comfyui" else None)
    requests = [replace(each, compat=compat, sampler="dpmpp_2m_sde") for each in (FIRST, *others)]
    jobs, seen = _started(pipeline, requests), []
    for stage in ("base", "refiner"):
        seen += Shared(pipeline, stage, jobs).steps()
    # Three conditionings make nine rows, of which a call takes eight.
    assert calls == {"unet": [8, 8] if compat == "diffusers" else [6, 3, 6, 3], "refiner_unet": [8]}
    for number, (request, job) in enumerate(zip(requests, jobs, strict=True)):
        expected = _alone(pipeline, request)
        mine = [step for index, step in seen if index == number]
        assert [(each.stage, each.index, each.total, each.pictures) for each in mine] == [
            (each.stage, each.index, each.total, each.pictures) for each in expected
        ]
        for step, its in zip(mine, expected, strict=True):
            for latents, reference in ((step.latents, its.latents), (step.denoised, its.denoised)):
                assert (latents is None) == (reference is None)
                assert latents is None or _close(latents, reference)
        assert pipeline.run is not None
        assert _close(job.final(), pipeline.run.final)
        assert job.run.handoff == pipeline.run.handoff
        assert _close(job.run.handoff_latents, pipeline.run.handoff_latents)
        assert {name: len(times) for name, times in job.run.timings.items()} == {"load": 2, "base": 2, "refiner": 1}


@pytest.mark.parametrize("compat", ["diffusers", "comfyui"])
def test_masks_differ_by_row(pipeline: Pipeline, compat: str) -> None:
    photo = np.random.default_rng(3).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    masks = [np.zeros((SIDE, SIDE), np.bool_) for _ in range(2)]
    masks[0][16:48, 8:40], masks[1][:32] = True, True
    requests = [replace(FIRST, image=photo, mask=mask, strength=0.9, compat=compat, seed=seed, sampler="heun",
                        handoff_step=None, handoff=0.5, steps=4, width=None, height=None,
                        leftover_noise=compat == "diffusers")
                for seed, mask in enumerate(masks)]  # fmt: skip
    found = _share(pipeline, requests)
    for request, latents in zip(requests, found, strict=True):
        _alone(pipeline, request)
        assert pipeline.run is not None
        assert _close(latents, pipeline.run.final)
    np.testing.assert_array_equal(found[1], _share(pipeline, requests[1:])[0])


@pytest.fixture(scope="module")
def references(pipeline: Pipeline) -> list[np.ndarray]:
    return [_share(pipeline, [request])[0] for request in FOUR]


@settings(max_examples=3)
@given(chosen=st.lists(st.sampled_from(range(4)), min_size=2, max_size=4, unique=True))
def test_the_bits_do_not_depend_on_who_shares_a_call(
    pipeline: Pipeline, references: list[np.ndarray], chosen: list[int]
) -> None:
    found = _share(pipeline, [FOUR[number] for number in chosen])
    for number, latents in zip(chosen, found, strict=True):
        np.testing.assert_array_equal(latents, references[number])


def test_a_job_that_is_dropped_leaves_the_others_their_bits(pipeline: Pipeline, references: list[np.ndarray]) -> None:
    jobs, seen = _started(pipeline, FOUR), []
    shared = Shared(pipeline, "base", jobs, rows=ROWS)
    for number, step in shared.steps():
        seen.append((number, step.stage))
        if (number, step.index, step.stage) == (0, 1, "base"):
            shared.drop(1)
    assert (1, "base") not in seen, "not even the step of the call that was under way"
    rest = [job for number, job in enumerate(jobs) if number != 1]
    list(Shared(pipeline, "refiner", rest, rows=ROWS).steps())
    for job, reference in zip(rest, [*references[:1], *references[2:]], strict=True):
        np.testing.assert_array_equal(job.final(), reference)
    with pytest.raises(UsageError, match="job 4 of 4 shared ones; give an index from 0"):
        shared.drop(4)


def test_nothing_runs_once_every_job_is_dropped(pipeline: Pipeline, calls: Calls) -> None:
    shared = Shared(pipeline, "base", _started(pipeline, FOUR[:2]))
    for number, step in shared.steps():
        if step.stage == "base":
            shared.drop(number)
    assert len(calls["unet"]) == 1


def test_nan_in_the_rows_of_a_job_fails_that_job(
    pipeline: Pipeline, references: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    (engine,) = pipeline.pool.phase("unet")
    infer = engine.infer

    def broken(inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        answer = infer(inputs)
        if jobs[1].run.timings["base"]:  # from its second step on, where its rows are the third and fourth
            answer["out_sample"][2, 0, 0, 0] = np.nan
        return answer

    jobs = _started(pipeline, FOUR[:3])
    jobs[1].run.timings["base"] = []
    monkeypatch.setattr(engine, "infer", broken)
    shared = Shared(pipeline, "base", jobs, rows=ROWS)
    steps = [number for number, step in shared.steps() if step.stage == "base"]
    assert steps == [0, 1, 2, 0, 2]
    assert [*shared.failed] == [1]
    assert isinstance(shared.failed[1], CorruptError)
    assert "NaN or infinity at timestep" in str(shared.failed[1])
    rest = [jobs[0], jobs[2]]
    list(Shared(pipeline, "refiner", rest, rows=ROWS).steps())
    for job, reference in zip(rest, references[:3:2], strict=True):
        np.testing.assert_array_equal(job.final(), reference)


def test_rows_beyond_a_call_go_into_further_ones(pipeline: Pipeline, calls: Calls) -> None:
    jobs = _started(pipeline, [replace(FIRST, count=5, steps=2, handoff=None, handoff_step=None)])
    steps = [step for _, step in Shared(pipeline, "base", jobs, rows=4).steps() if step.stage == "base"]
    assert calls["unet"] == [4] * 6, "two pictures a call, at each of two steps"
    assert [step.pictures for step in steps] == [slice(0, 2), slice(2, 4), slice(4, 5)] * 2
    assert [(step.index, step.total) for step in steps] == [(index, 6) for index in range(1, 7)]


def test_calls_have_a_number_of_rows_that_the_plans_take(
    pipeline: Pipeline, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def profile(rows: int) -> Profile:
        shapes = {name: tuple((rows, *shape[1:]) for _ in range(3)) for name, shape in inputs.items()}
        return Profile(shapes=shapes)

    jobs = _started(pipeline, FOUR[:3])
    width = jobs[0].embeds["base"][0][0].hidden.shape
    inputs = {"sample": (0, *jobs[0].latents.shape[1:]), "encoder_hidden_states": (0, *width)}
    monkeypatch.setattr(pipeline.pool, "profiles", lambda _: (profile(4), profile(8)))
    list(Shared(pipeline, "base", jobs).steps())
    assert calls["unet"] == [8, 8], "six rows, and two that repeat one"
    with pytest.raises(UsageError, match=r"rows=6: the UNet's plan takes no call of that many; give rows=8"):
        Shared(pipeline, "base", jobs, rows=6)
    with pytest.raises(UsageError, match=r"rows=9: .*; give fewer rows"):
        Shared(pipeline, "base", jobs, rows=9)


def test_prompts_of_other_lengths_have_calls_of_their_own(pipeline: Pipeline, calls: Calls) -> None:
    alike = replace(FIRST, compat="comfyui")
    jobs = _started(pipeline, [alike, replace(alike, prompt="a red star, " * 40, seed=6), replace(alike, seed=7)])
    list(Shared(pipeline, "base", jobs).steps())
    assert calls["unet"] == [4, 2] * 2


@pytest.mark.parametrize(
    ("change", "name"),
    [({"steps": 4}, "steps"), ({"sampler": "heun"}, "sampler"), ({"schedule": "trailing+karras"}, "schedule"),
     ({"handoff_step": 1}, "steps"), ({"width": 128}, "width"), ({"guidance": 1.0}, "guidance")],
)  # fmt: skip
def test_jobs_that_are_not_alike_are_refused(pipeline: Pipeline, change: Mapping[str, Any], name: str) -> None:
    jobs = _started(pipeline, [FIRST, replace(FIRST, **change)])
    with pytest.raises(UsageError, match=f"jobs 0 and 1 share no call of a UNet: their {name} differs"):
        Shared(pipeline, "base", jobs)


def test_what_cannot_be_drawn_is_refused_in_one_line(pipeline: Pipeline) -> None:
    with pytest.raises(UsageError, match="no job to share a call"):
        Shared(pipeline, "base", [])
    with pytest.raises(UsageError, match=r"job 0: its prompts are not encoded; call Pipeline\.encode first"):
        Shared(pipeline, "base", [pipeline.start(FIRST)])
    with pytest.raises(UsageError, match=r"rows=1: a picture of job 0 has 2 conditionings.*; give rows=2 or more"):
        Shared(pipeline, "base", _started(pipeline, [FIRST]), rows=1)


def test_a_stage_without_steps_does_nothing(pipeline: Pipeline, calls: Calls) -> None:
    jobs = [pipeline.start(replace(FIRST, handoff=None, handoff_step=None))]
    assert list(Shared(pipeline, "refiner", jobs).steps()) == []
    assert calls["refiner_unet"] == []


def test_a_request_is_resolved_once_and_nothing_is_changed(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    size, tokens = Range(min=SIDE, opt=SIDE, max=SIDE), Range(min=77, opt=77, max=77)
    limits = PlanLimits(height=size, width=size, pictures=4, tokens=tokens)
    monkeypatch.setattr(pipeline.pool, "limits", limits)
    monkeypatch.setattr(pipeline.pool, "check_room", lambda *sizes, **_: asked.append(sizes))
    before = dict(vars(pipeline.pool)), list(pipeline.pool.loads)
    resolved = pipeline.resolve(replace(FIRST, seed=None, count=2))
    assert (dict(vars(pipeline.pool)), pipeline.pool.loads) == before
    ((sizes, uses, workload),) = asked
    assert (sizes.rows, sizes.tokens, sizes.height, workload) == (4, 77, SIDE, Workload())
    assert {"unet", "refiner_unet"} < {*uses}
    job = pipeline.start(replace(FIRST, seed=None, count=2), resolved)
    assert job.run.request is resolved
    monkeypatch.setattr(pipeline.pool, "make_room", lambda *sizes: asked.append(sizes))
    for cached in (pipeline.resolve, pipeline.start):
        cached(replace(FIRST, steps=12, handoff=0.5, handoff_step=None, cache=2, refiner_cache=1))
        assert asked[-1][2] == Workload(cached=("base",))
    with pytest.raises(UsageError, match="'plms' is unknown"):
        pipeline.resolve(replace(FIRST, sampler="plms"))


def test_the_notes_that_a_pipeline_remembers_are_bounded(
    pipeline: Pipeline, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdxl_trt.runtime.pipeline.pipeline.MOST_SAID", 3)
    for note in ("often", "one", "often", "two", "often", "three", "four", "often"):
        pipeline._say([note])
    assert [record.message for record in caplog.records].count("often") == 1
    assert len(pipeline._said) == 3


def test_a_stage_of_a_lone_job_is_iterated_by_the_caller(pipeline: Pipeline) -> None:
    """Steps may be changed by who receives them, and estimates only be read."""
    jobs = _started(pipeline, FOUR[:1])
    steps: list[Step] = []
    shared: Callable[[], Iterator[tuple[int, Step]]] = Shared(pipeline, "base", jobs, rows=ROWS).steps
    for _, step in shared():
        if step.latents is not None and step.denoised is not None:
            steps.append(step)
            step.latents.fill(np.nan)
            assert not step.denoised.flags.writeable
    assert len(steps) == 2
    assert np.isfinite(jobs[0].latents).all()
