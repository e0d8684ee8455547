"""Where both stages start and stop: what contradicts itself is refused, what does not fit together is told."""

import logging
from typing import Any

import numpy as np
import pytest

from sdxl_trt.engines.bundle.manifest import Scheduler
from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime.diffusion.schedules.schedule import Schedule, make_comfyui_schedule
from sdxl_trt.runtime.request import Request
from sdxl_trt.runtime.request.handoff import StageRanges, StepRange, split_steps

SDXL = Scheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@pytest.fixture(scope="module")
def schedule() -> Schedule:
    return make_comfyui_schedule(SDXL, 50)


def _cuts(schedule: Schedule, *, refiner: bool = True, **settings: Any) -> StageRanges:
    return split_steps(Request(**settings), schedule, refiner=refiner)


def test_a_handoff_is_one_cut(schedule: Schedule, caplog: Any) -> None:
    expected = StageRanges(StepRange(0, 40, add_noise=True), StepRange(40, 50, leftover_noise=False))
    sigma = float(schedule.sigmas[40])
    for settings in ({"handoff_step": 40}, {"handoff_sigma": sigma}, {"handoff_sigma": sigma * 1.01},
                     {"base_end_step": 40}, {"refiner_start_step": 40},
                     {"base_end_step": 40, "refiner_start_step": 40, "refiner_end_step": 10_000}):  # fmt: skip
        assert _cuts(schedule, **settings) == expected
    assert _cuts(schedule, handoff=0.8) == _cuts(schedule)
    assert caplog.records == []


def test_the_base_alone_ends_clean_unless_asked_otherwise(schedule: Schedule) -> None:
    assert _cuts(schedule, handoff=None) == StageRanges(StepRange(0, 50, add_noise=True, leftover_noise=False), None)
    assert _cuts(schedule, refiner=False).base == StepRange(0, 50, add_noise=True, leftover_noise=False)
    part = _cuts(schedule, handoff=None, base_end_step=20).base
    assert (part.steps, part.sigmas(schedule.sigmas)[-1]) == (20, 0)
    noisy = _cuts(schedule, handoff=None, base_end_step=20, leftover_noise=True).base
    assert noisy.sigmas(schedule.sigmas)[-1] == schedule.sigmas[20]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"base_end_step": 40, "refiner_start_step": 35}, ["stops at step 40, the refiner starts at 35", "twice"]),
        ({"base_end_step": 35, "refiner_start_step": 40}, ["the refiner starts at 40", "left out"]),
        ({"handoff_step": 40, "refiner_add_noise": True}, ["the refiner adds noise"]),
        ({"handoff_step": 40, "leftover_noise": False}, ["the base leaves no noise"]),
        ({"base_end_step": 10_000}, ["would start at step 10000 of 50: it does nothing"]),
        ({"base_end_step": 40, "refiner_end_step": 40}, ["would start at step 40 of 40: it does nothing"]),
        ({"base_start_step": 40, "base_end_step": 40}, ["the base would start at step 40 and stop at 40"]),
    ],
)
def test_what_does_not_fit_together_is_told(
    schedule: Schedule, settings: dict[str, Any], words: list[str], caplog: Any
) -> None:
    with caplog.at_level(logging.WARNING):
        _cuts(schedule, **settings)
    assert len(caplog.records) == 1
    assert all(word in caplog.text for word in words)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"handoff": 0.5, "handoff_sigma": 1.0}, "--handoff and --handoff-sigma state the same thing"),
        ({"handoff_step": 4, "base_end_step": 4}, "--handoff-step and --base-end-step state the same thing"),
        ({"handoff": 0.5, "refiner_start_step": 4}, "--handoff and --refiner-start-step state"),
        ({"handoff": None, "refiner_start_step": 4}, "--refiner-start-step says where the refiner starts"),
        ({"handoff_sigma": 99.0}, "--handoff-sigma 99 leaves the base no step of 50"),
        ({"handoff_sigma": 0.001}, "leaves the refiner no step"),
        ({"handoff_sigma": -1.0}, "positive"),
        ({"handoff_sigma": float("nan")}, "positive"),
        ({"base_end_step": -1}, "--base-end-step -1: steps count from 0"),
    ],
)
def test_contradictions_are_refused(schedule: Schedule, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        _cuts(schedule, **settings)


@pytest.mark.parametrize("settings", [{"handoff_sigma": 1.0}, {"refiner_start_step": 4}])
def test_no_refiner_can_start(schedule: Schedule, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"no refiner; leave --{next(iter(settings)).replace('_', '-')} out"):
        _cuts(schedule, refiner=False, **settings)


def test_noise_is_scaled_for_the_sigma_that_a_part_starts_at(schedule: Schedule) -> None:
    latents, noise = np.full((1, 4, 2, 2), 3, np.float32), np.ones((1, 4, 2, 2), np.float32)
    full = StepRange(0, 50, add_noise=True).noised(latents, noise, schedule)
    np.testing.assert_allclose(full, 3 + np.hypot(1, 14.614641), rtol=1e-6)
    late = StepRange(40, 50, add_noise=True).noised(latents, noise, schedule)
    np.testing.assert_allclose(late, 3 + schedule.sigmas[40], rtol=1e-6)
    for part in (StepRange(40, 50), StepRange(40, 40, add_noise=True)):
        same = part.noised(latents, noise, schedule)
        np.testing.assert_array_equal(same, latents)
        assert same is not latents
    # linear_quadratic and the like start at the highest sigma, ddim_uniform need not.
    lower = make_comfyui_schedule(SDXL, 50, schedule="ddim_uniform")
    start = StepRange(0, 50, add_noise=True).noised(latents, noise, lower)
    np.testing.assert_allclose(start, 3 + lower.sigmas[0], rtol=1e-6)
