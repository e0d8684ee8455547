"""The schedule against diffusers' EulerDiscreteScheduler: timesteps, sigmas, scale of the initial noise."""

from typing import Any

import numpy as np
import pytest
from diffusers import EulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_trt.engines.bundle import Scheduler
from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime.sigmas import make_schedule

# diffusers' own: it gives torch tensors to np.array.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SPACINGS = ["leading", "trailing", "linspace"]
STEPS = [1, 2, 3, 4, 5, 7, 8, 12, 14, 20, 25, 27, 30, 40, 50, 64, 81, 99, 100, 150, 243, 250, 333, 500, 997, 999, 1000]


def _compare(settings: dict[str, Any], steps: int, tolerance: float = 3e-6) -> None:
    reference = EulerDiscreteScheduler(**settings)
    reference.set_timesteps(steps)
    ours = make_schedule(Scheduler(**settings), steps)
    # For 62 step counts diffusers' trailing grid has one step more than asked, at timestep -1: not taken over.
    timesteps, sigmas = reference.timesteps.numpy(), reference.sigmas.numpy()
    assert timesteps[steps:].tolist() in ([], [-1.0])
    np.testing.assert_allclose(ours.timesteps, timesteps[:steps], rtol=1e-7)
    np.testing.assert_allclose(ours.sigmas[:-1], sigmas[:steps], rtol=tolerance)
    assert (ours.sigmas[-1], sigmas[-1]) == (0.0, 0.0)
    assert ours.initial_scale == pytest.approx(float(reference.init_noise_sigma), rel=tolerance)
    assert (ours.steps, ours.timesteps.dtype, ours.sigmas.dtype) == (steps, np.float32, np.float32)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("betas", ["scaled_linear", "linear"])
def test_the_grid_is_diffusers(spacing: str, betas: str) -> None:
    for steps in STEPS:
        _compare(SDXL | {"beta_schedule": betas, "timestep_spacing": spacing}, steps)


@settings(deadline=None, max_examples=60)
@given(
    spacing=st.sampled_from(SPACINGS), total=st.integers(10, 2000), offset=st.integers(0, 1),
    start=st.floats(5e-4, 1e-3), end=st.floats(2e-3, 0.03), data=st.data(),
)  # fmt: skip
def test_any_config_is_diffusers(
    spacing: str, total: int, offset: int, start: float, end: float, data: st.DataObject
) -> None:
    config = SDXL | {"timestep_spacing": spacing, "num_train_timesteps": total, "steps_offset": offset}
    # sigma comes from 1 - alpha_bar in float32: one unit in the last place weighs more where little noise is.
    _compare(config | {"beta_start": start, "beta_end": end}, data.draw(st.integers(1, total)), tolerance=2e-4)


def test_an_empty_config_has_diffusers_defaults() -> None:
    reference, ours = EulerDiscreteScheduler().config, Scheduler()
    for name in Scheduler.__struct_fields__:
        if name != "class_name":
            assert getattr(ours, name) == reference[name], name


@pytest.mark.parametrize(("steps", "first", "sigma"), [(30, 958, 11.477), (14, 924, 9.49)])
def test_published_numbers(steps: int, first: int, sigma: float) -> None:
    schedule = make_schedule(Scheduler(**SDXL, timestep_spacing="leading"), steps)
    assert schedule.timesteps[0] == first
    assert schedule.sigmas[0] == pytest.approx(sigma, abs=5e-3)


def test_the_whole_range_has_the_published_ends() -> None:
    sigmas = make_schedule(Scheduler(**SDXL, timestep_spacing="linspace"), 1000).sigmas
    assert (float(sigmas[0]), float(sigmas[-2])) == pytest.approx((14.6146, 0.029167), rel=1e-4)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 30, 999])
def test_each_sigma_knows_its_timestep(spacing: str, steps: int) -> None:
    schedule = make_schedule(Scheduler(**SDXL, timestep_spacing=spacing), steps)
    found = [schedule.timestep(float(sigma)) for sigma in schedule.sigmas[:-1]]
    np.testing.assert_array_equal(found, schedule.timesteps)


def test_a_sigma_between_two_lies_on_a_log_sigma_line() -> None:
    schedule = make_schedule(Scheduler(**SDXL, timestep_spacing="leading"), 30)
    high, low = (float(sigma) for sigma in schedule.sigmas[10:12])
    middle = (schedule.timesteps[10] + schedule.timesteps[11]) / 2
    assert schedule.timestep((high * low) ** 0.5) == pytest.approx(middle, abs=1e-3)
    assert schedule.timestep(1000.0) == schedule.timesteps[0]
    assert schedule.timestep(1e-6) == schedule.timesteps[-1]


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_a_number_of_steps_that_cannot_be_names_the_range(steps: int) -> None:
    with pytest.raises(UsageError, match=f"--steps {steps}: choose 1 to 1000"):
        make_schedule(Scheduler(), steps)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beta_schedule": "squaredcos_cap_v2"}, "'squaredcos_cap_v2' is not supported; scaled_linear and linear are"),
        ({"timestep_spacing": "cosine"}, "'cosine' is unknown; leading, trailing and linspace are known"),
    ],
)
def test_an_unknown_schedule_names_the_known_ones(settings: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_schedule(Scheduler(**settings), 10)
