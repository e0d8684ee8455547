"""The cut against diffusers' own: the base's filter and the refiner's get_timesteps."""

from types import SimpleNamespace

import numpy as np
import pytest
from diffusers import EulerDiscreteScheduler, StableDiffusionXLImg2ImgPipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_trt.engines.bundle.manifest import Scheduler
from sdxl_trt.runtime.diffusion.schedules.schedule import make_schedule
from sdxl_trt.runtime.request.handoff import StepRange, step_at_fraction, step_at_sigma

# diffusers' own: it gives torch tensors to np.array.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def _diffusers_cut(scheduler: EulerDiscreteScheduler, steps: int, fraction: float) -> int:
    """Return the base's number of steps, having checked that diffusers' refiner takes the others."""
    scheduler.set_timesteps(steps)
    total = scheduler.config.num_train_timesteps
    # pipeline_stable_diffusion_xl.py, "8. Denoising loop": denoising_end
    cutoff = round(total - (fraction * total))
    base = len(list(filter(lambda ts: ts >= cutoff, scheduler.timesteps)))
    pipeline = SimpleNamespace(scheduler=scheduler)
    _, refiner = StableDiffusionXLImg2ImgPipeline.get_timesteps(pipeline, steps, 0.3, "cpu", denoising_start=fraction)
    assert base + refiner == len(scheduler.timesteps)
    return base


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_the_cut_is_diffusers(spacing: str) -> None:
    scheduler = EulerDiscreteScheduler(**SDXL, timestep_spacing=spacing)
    for steps in [*range(1, 61), 75, 80, 100, 150, 250, 999]:
        schedule = make_schedule(Scheduler(**SDXL, timestep_spacing=spacing), steps)
        for fraction in (0.001, 0.1, 0.25, 0.5, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.999):
            expected = _diffusers_cut(scheduler, steps, fraction)
            assert step_at_fraction(schedule, fraction) == expected, (steps, fraction)


@settings(deadline=None, max_examples=200)
@given(steps=st.integers(1, 60), fraction=st.floats(0.0, 1.0, exclude_min=True, exclude_max=True))
def test_any_fraction_is_cut_as_diffusers_cuts_it(steps: int, fraction: float) -> None:
    expected = _diffusers_cut(EulerDiscreteScheduler(**SDXL, timestep_spacing="leading"), steps, fraction)
    assert step_at_fraction(make_schedule(Scheduler(**SDXL, timestep_spacing="leading"), steps), fraction) == expected


@pytest.mark.parametrize(("steps", "base"), [(20, 16), (25, 20), (30, 23), (40, 32), (50, 40)])
def test_published_cuts_at_four_fifths(steps: int, base: int) -> None:
    schedule = make_schedule(Scheduler(**SDXL, timestep_spacing="leading"), steps)
    assert step_at_fraction(schedule, 0.8) == base


def test_half_a_timestep_rounds_to_even_as_python_does() -> None:
    """total - fraction * total = 500.5 and 499.5: both round to 500."""
    schedule = make_schedule(Scheduler(**SDXL, timestep_spacing="linspace"), 1000)
    assert step_at_fraction(schedule, 0.4995) == step_at_fraction(schedule, 0.5005) == 500


def test_one_grid_is_cut_once() -> None:
    schedule = make_schedule(Scheduler(**SDXL, timestep_spacing="leading"), 30)
    for step in range(1, 30):
        before, after = (StepRange(*ends).sigmas(schedule.sigmas) for ends in ((0, step), (step, 30)))
        assert (len(before) - 1, len(after) - 1) == (step, 30 - step)
        assert before[-1] == after[0], "both hold the sigma at which the latents change hands"
        np.testing.assert_array_equal(np.concatenate([before, after[1:]]), schedule.sigmas)


def test_a_cut_at_the_end_leaves_all_to_the_base() -> None:
    sigmas = np.array([3, 2, 1, 0], np.float32)
    assert StepRange(0, 3).sigmas(sigmas).tolist() == [3, 2, 1, 0]
    assert (StepRange(3, 3).sigmas(sigmas).tolist(), StepRange(3, 3).steps) == ([0], 0)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_a_handoff_by_sigma_is_at_the_first_one_not_above_it(spacing: str) -> None:
    schedule = make_schedule(Scheduler(**SDXL, timestep_spacing=spacing), 30)
    for step, sigma in enumerate(schedule.sigmas[:-1].tolist()):
        assert step_at_sigma(schedule, sigma) == step
        assert step_at_sigma(schedule, float(f"{sigma:.6g}")) == step, "as it is printed"
        assert step_at_sigma(schedule, sigma * 1.001) == step
        assert step_at_sigma(schedule, sigma * 0.999) == step + 1
