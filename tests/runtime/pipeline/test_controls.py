"""Runs with ControlNets: what they change, when they work, and that their residuals stay on the device."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdxl_trt.engines import CorruptError, IncompatibleError, UsageError
from sdxl_trt.engines.backends.ort.engine import OrtEngine
from sdxl_trt.engines.backends.trt.engine import TrtEngine
from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.mini.embedded import bundle_path
from sdxl_trt.runtime.controls.use import ControlUse
from sdxl_trt.runtime.images.inputs import InputPicture, as_input
from sdxl_trt.runtime.pipeline.pipeline import Pipeline, open_bundle
from sdxl_trt.runtime.pipeline.run import Job, Step
from sdxl_trt.runtime.pipeline.shared import Shared
from sdxl_trt.runtime.request.request import Request

SIDE = 64
REQUEST = Request("a star", seed=3, steps=4, width=SIDE, height=SIDE, handoff=None)


def _picture(seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> InputPicture:
    return as_input(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


def _with(*uses: ControlUse, **changes: Any) -> Request:
    return replace(REQUEST, controls=uses, **changes)


EDGES, POSES = ControlUse(_picture(1), 0.8), ControlUse(_picture(2), 0.5)


def _drawn(pipeline: Pipeline, request: Request) -> Any:
    assert list(pipeline.generate(request))
    assert pipeline.run is not None
    return pipeline.run.final


@pytest.fixture(scope="module")
def pipeline(controlled: Path) -> Any:
    with open_bundle(controlled, provider="ort-cpu", residency="resident") as opened:
        yield opened


def test_a_unet_with_unused_residual_inputs_gives_the_same_output_bit_by_bit(controlled: Path) -> None:
    outputs = []
    for root in (bundle_path(), controlled):
        engine = OrtEngine(read_bundle(root), "unet", standard=True)
        engine.load()
        outputs.append(engine.infer(_conditions(2))["out_sample"])
    assert np.array_equal(*outputs)


def test_a_scale_of_zero_gives_the_latents_without_a_controlnet_bit_by_bit(pipeline: Pipeline) -> None:
    without = _drawn(pipeline, REQUEST)
    assert {"controlnet", "controlnet_2"}.isdisjoint(pipeline.pool.loads)
    assert np.array_equal(_drawn(pipeline, _with(EDGES._replace(scale=0.0))), without)
    assert np.array_equal(_drawn(pipeline, _with(EDGES._replace(start=0.9, end=0.95))), without)
    assert not np.array_equal(_drawn(pipeline, _with(EDGES)), without)


def test_the_order_of_the_pictures_chooses_the_controlnets_unless_they_are_named(pipeline: Pipeline) -> None:
    both = _drawn(pipeline, _with(EDGES, POSES))
    swapped = _drawn(pipeline, _with(POSES._replace(net="poses"), EDGES._replace(net="edges")))
    np.testing.assert_allclose(both, swapped, atol=0.05)  # the sum in another order, in half precision
    other = _drawn(pipeline, _with(EDGES._replace(net="poses")))
    assert np.abs(other - _drawn(pipeline, _with(EDGES))).max() > 0.1
    assert np.abs(both - _drawn(pipeline, _with(EDGES))).max() > 0.1


def test_each_picture_of_a_batch_follows_the_controlnet(pipeline: Pipeline) -> None:
    together = _drawn(pipeline, _with(EDGES, count=2))
    for number in range(2):
        alone = _drawn(pipeline, _with(EDGES, seed=3 + number))
        np.testing.assert_allclose(together[number : number + 1], alone, atol=0.05)


def test_a_side_alone_follows_the_controlnet(pipeline: Pipeline) -> None:
    sides = [_drawn(pipeline, _with(EDGES._replace(side=side))) for side in ("positive", "negative", "both")]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(sides[one] - sides[other]).max() > 0.05


def test_residuals_never_cross_to_the_host(
    simulated: Any, controlled: Path, tmp_path: Path, pipeline: Pipeline
) -> None:
    """Two ControlNets and the UNet, each as a captured graph, copy what the UNet alone copies."""
    bundle = simulated.bundle(controlled, tmp_path / "bundle", height=SIDE, width=SIDE)
    request, copied, done = _with(EDGES, POSES), [], []
    simulated.spoil(lambda execution: done.append(execution) or False)  # only watches
    with open_bundle(bundle, provider="tensorrt", residency="swap", plan_for=request) as planned:
        for step in planned.steps(request):
            moved = simulated.since()
            if step.stage == "base" and step.index > 1:
                copied.append(moved)
        assert planned.run is not None
        latents = planned.run.final
        assert planned.pool.loads[2:5] == ["unet", "controlnet", "controlnet_2"]
    sample = 2 * 4 * (SIDE // 8) ** 2 * 2
    assert copied == [{"HostToDevice": 3 * (sample + 2 * 4), "DeviceToHost": sample}] * 3
    captured = [execution.plan.component for execution in done if execution.captured]
    assert captured == ["controlnet", "controlnet_2", "unet"] * 3
    np.testing.assert_allclose(latents, _drawn(pipeline, request), atol=0.05)


def test_a_residual_in_another_engine_s_memory_is_refused(simulated: Any, controlled: Path, tmp_path: Path) -> None:
    bundle = read_bundle(simulated.bundle(controlled, tmp_path / "bundle", height=SIDE, width=SIDE))
    request = _with(EDGES)
    with (
        open_bundle(bundle.root, provider="tensorrt") as one,
        open_bundle(controlled, provider="ort-cpu") as other,
    ):
        planned, found = one.pool.phase("unet")[0], _infer(other.pool.phase("controlnet")[0], request)
        assert isinstance(planned, TrtEngine)
        with pytest.raises(UsageError, match="not on this engine's device; run both"):
            planned.infer({**_conditions(1), **found})


def _conditions(rows: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "sample": rng.standard_normal((rows, 4, 8, 8)).astype(np.float16),
        "timestep": np.full(rows, 500, np.float32),
        "encoder_hidden_states": rng.standard_normal((rows, 77, 112)).astype(np.float16),
        "text_embeds": rng.standard_normal((rows, 64)).astype(np.float32),
        "time_ids": np.full((rows, 6), 64, np.float32),
    }


def _infer(engine: Any, request: Request) -> Any:
    count = len(engine.component.outputs)
    picture = np.zeros((1, 3, SIDE, SIDE), np.float16)
    assert request.controls
    return engine.infer_on_device(
        {**_conditions(1), "controlnet_cond": picture, "scales": np.ones((1, count), np.float32)}
    )


Refusals = Sequence[tuple[Request, type[Exception], str]]
REFUSED: Refusals = [
    (_with(EDGES, POSES, EDGES), UsageError, "is picture 3, but the bundle has 2 ControlNets"),
    (_with(EDGES._replace(net="depth")), UsageError, "has no ControlNet 'depth'; it has edges, poses"),
    (_with(EDGES, POSES._replace(net="edges")), UsageError, "second picture for the ControlNet 'edges'"),
    (_with(EDGES._replace(start=0.6, end=0.5)), UsageError, "two fractions in rising order"),
    (_with(EDGES._replace(start=0.5, end=0.5)), UsageError, "works from 0.5 to 0.5 of the steps; give two fractions"),
    (_with(EDGES._replace(scale=float("nan"))), UsageError, "scale nan; give a number"),
    (_with(EDGES._replace(picture="missing.png")), UsageError, "--control missing.png: No such file"),
    (_with(ControlUse(_picture(1, (64, 320))), width=320, height=192), UsageError,
     "320x64, another shape than the run's 320x192; crop it, or give --width 320 --height 64"),
    (_with(EDGES, image=np.zeros((64, 64, 3), np.uint8), refine=True, handoff="auto"), UsageError,
     "the refiner alone runs"),
    (_with(control_guess=True), UsageError, "--control-guess is how ControlNets work"),
    (_with(EDGES, control_guess=True, compat="comfyui"), UsageError, "ComfyUI's nodes have no such switch"),
    (_with(ControlUse(as_input(np.zeros((1, 4, 8, 8), np.float32)))), UsageError, "holds latents"),
]  # fmt: skip


@pytest.mark.parametrize(("request_", "error", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_what_cannot_run_is_refused_before_anything_is_loaded(
    pipeline: Pipeline, request_: Request, error: type[Exception], message: str
) -> None:
    before = len(pipeline.pool.loads)
    with pytest.raises(error, match=message):
        pipeline.start(request_)
    assert len(pipeline.pool.loads) == before


def test_a_controlnet_that_works_in_no_step_is_told_of(pipeline: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    told = "no step of the base is within {} of the run, so the ControlNet does nothing"
    for request, span in (
        (_with(EDGES._replace(end=0.2)), "0 to 0.2"),
        (_with(EDGES._replace(start=0.5, end=0.5), compat="comfyui", steps=5), "0.5 to 0.5"),
        (_with(EDGES, handoff="auto", base_end_step=0), "0 to 1"),
    ):
        pipeline.start(request)
        assert told.format(span) in caplog.text
    caplog.clear()
    pipeline.start(_with(EDGES._replace(end=0.25)))
    assert not caplog.records


def test_a_bundle_without_controlnets_says_how_to_export_one() -> None:
    with (
        open_bundle(bundle_path(), provider="ort-cpu") as opened,
        pytest.raises(IncompatibleError, match="has no ControlNet; export it again with one: export-engines --base"),
    ):
        opened.start(_with(EDGES))


def test_the_picture_gives_the_size_and_another_size_of_its_shape_is_scaled(pipeline: Pipeline) -> None:
    larger = ControlUse(_picture(1, (96, 160)))
    free = replace(_with(larger), width=None, height=None)
    assert (pipeline.start(free).run.request.width, pipeline.start(free).run.request.height) == (160, 96)
    (control,) = pipeline.start(replace(_with(larger), width=320, height=192)).run.request.controls
    assert control.prepared((192, 320), comfyui=False).shape == (3, 192, 320)


def _encoded(pipeline: Pipeline, *requests: Request) -> list[Job]:
    jobs = [pipeline.start(request) for request in requests]
    list(pipeline.encode(jobs))
    return jobs


def test_a_request_with_a_controlnet_shares_no_call(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = _encoded(pipeline, _with(EDGES, steps=2), _with(EDGES, steps=2))
    with pytest.raises(
        UsageError, match="job 0: a request with a ControlNet or a step cache shares no call of the base; run it alone"
    ):
        Shared(pipeline, "base", jobs)
    steps = [(number, step.stage, step.index) for number, step in Shared(pipeline, "base", jobs[:1]).steps()]
    assert steps == [(0, "load", 1), (0, "base", 1), (0, "base", 2)]
    assert np.array_equal(jobs[0].final(), _drawn(pipeline, _with(EDGES, steps=2)))
    monkeypatch.setattr(pipeline, "base", _broken)
    shared = Shared(pipeline, "base", jobs[1:])
    assert list(shared.steps()) == []
    assert str(shared.failed[0]) == "NaN"


def _broken(*_: object) -> Iterator[Step]:
    raise CorruptError("NaN")
    yield
