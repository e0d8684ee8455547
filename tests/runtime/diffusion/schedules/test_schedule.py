"""The schedule against diffusers' EulerDiscreteScheduler: timesteps, sigmas, scale of the initial noise."""

from typing import Any

import msgspec
import numpy as np
import pytest
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_trt.engines.bundle.manifest import Scheduler
from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime.diffusion.schedules.schedule import make_comfyui_schedule, make_schedule

# diffusers' own warning: it passes torch tensors to np.array.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SPACINGS = ["leading", "trailing", "linspace"]
STEPS = [1, 2, 3, 4, 5, 7, 8, 12, 14, 20, 25, 27, 30, 40, 50, 64, 81, 99, 100, 150, 243, 250, 333, 500, 997, 999, 1000]


def _compare(settings: dict[str, Any], steps: int, tolerance: float = 3e-6) -> None:
    reference = EulerDiscreteScheduler(**settings)
    reference.set_timesteps(steps)
    ours = make_schedule(Scheduler(**settings), steps)
    # For 62 step counts diffusers' trailing grid has one step more than requested, at timestep -1; ours omits it.
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
def test_the_grid_of_any_config_is_diffusers(
    spacing: str, total: int, offset: int, start: float, end: float, data: st.DataObject
) -> None:
    config = SDXL | {"timestep_spacing": spacing, "num_train_timesteps": total, "steps_offset": offset}
    # sigma comes from 1 - alpha_bar in float32: a unit in the last place matters more at low noise.
    _compare(config | {"beta_start": start, "beta_end": end}, data.draw(st.integers(1, total)), tolerance=2e-4)


def test_an_empty_config_has_diffusers_defaults() -> None:
    reference, ours = EulerDiscreteScheduler().config, Scheduler()
    ours_alone = {"class_name", "sampler", "use_lu_lambdas", "set_alpha_to_one", "original_inference_steps", "edm"}
    for name in Scheduler.__struct_fields__:
        if name not in ours_alone:
            assert getattr(ours, name) == reference[name], name


@pytest.mark.parametrize(("steps", "first", "sigma"), [(30, 958, 11.477), (14, 924, 9.49)])
def test_published_numbers(steps: int, first: int, sigma: float) -> None:
    schedule = make_schedule(Scheduler(**SDXL, timestep_spacing="leading"), steps)
    assert schedule.timesteps[0] == first
    assert schedule.sigmas[0] == pytest.approx(sigma, abs=5e-3)


def test_the_full_range_has_the_published_ends() -> None:
    sigmas = make_schedule(Scheduler(**SDXL, timestep_spacing="linspace"), 1000).sigmas
    assert (float(sigmas[0]), float(sigmas[-2])) == pytest.approx((14.6146, 0.029167), rel=1e-4)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 30, 999])
def test_each_sigma_has_its_timestep(spacing: str, steps: int) -> None:
    schedule = make_schedule(Scheduler(**SDXL, timestep_spacing=spacing), steps)
    found = [schedule.timestep(float(sigma)) for sigma in schedule.sigmas[:-1]]
    np.testing.assert_array_equal(found, schedule.timesteps)


def test_a_sigma_off_the_grid_has_its_training_timestep() -> None:
    """Interpolated in log sigma between two training timesteps, whatever the grid's neighbouring sigmas are."""
    schedule = make_schedule(Scheduler(**SDXL, timestep_spacing="leading"), 30)
    high, low = (float(sigma) for sigma in schedule.training[[501, 500]])
    assert schedule.timestep(high) == pytest.approx(501, abs=1e-3)
    assert schedule.timestep((high * low) ** 0.5) == pytest.approx(500.5, abs=1e-3)
    assert schedule.timestep(1000.0) == 999
    assert schedule.timestep(1e-6) == 0
    beside = schedule.timestep(float(schedule.sigmas[10]) * 1.001)
    assert 0.05 < beside - schedule.timesteps[10] < 1.0, "near a sigma of the grid is not on the grid"


def test_comfyuis_timesteps_are_whole() -> None:
    schedule = make_comfyui_schedule(Scheduler(**SDXL), 30, schedule="karras")
    assert (schedule.timesteps == schedule.timesteps.round()).all()
    between = float(schedule.training[500]) ** 0.7 * float(schedule.training[501]) ** 0.3
    assert schedule.timestep(between) == 500
    assert schedule.timestep(1000.0) == 999


def test_start_and_end_are_in_the_scheduler_classes_scale() -> None:
    """Variance-preserving classes start with unit variance, and keep their scale if they end above 0."""
    config = Scheduler(**SDXL, timestep_spacing="trailing")
    euler, multistep, ddim = (make_schedule(config, 20, sampler) for sampler in ("euler", "dpmpp_2m", "ddim"))
    assert euler.initial_scale == euler.sigmas[0]
    assert multistep.initial_scale == pytest.approx(float(np.hypot(multistep.sigmas[0], 1)))
    assert (euler.final_scale, multistep.final_scale) == (1.0, 1.0)
    assert ddim.final_scale == pytest.approx(float(DDIMScheduler(**SDXL).alphas_cumprod[0]) ** 0.5, rel=1e-6)


def test_comfyui_scales_the_noise_by_the_first_sigma() -> None:
    whole = make_comfyui_schedule(Scheduler(**SDXL), 20, schedule="normal")
    assert whole.initial_scale == pytest.approx(float(np.hypot(whole.sigmas[0], 1)))
    below = make_comfyui_schedule(Scheduler(**SDXL), 30, schedule="ddim_uniform")
    assert below.sigmas[0] < whole.sigmas[0]
    assert below.initial_scale == below.sigmas[0]


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_an_impossible_number_of_steps_names_the_range(steps: int) -> None:
    with pytest.raises(UsageError, match=f"--steps {steps}: choose 1 to 1000"):
        make_schedule(Scheduler(), steps)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beta_schedule": "squaredcos_cap_v2"}, "'squaredcos_cap_v2' is not supported; scaled_linear and linear are"),
        ({"timestep_spacing": "cosine"}, "'cosine' is unknown; choose leading, trailing or linspace"),
    ],
)
def test_an_unknown_schedule_names_the_known_ones(settings: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_schedule(Scheduler(**settings), 10)


@pytest.mark.parametrize("transform", ["karras", "exponential", "beta"])
def test_a_config_that_transforms_its_sigmas_is_followed(transform: str) -> None:
    plain = Scheduler(beta_schedule="scaled_linear", timestep_spacing="trailing")
    config = msgspec.structs.replace(plain, **{f"use_{transform}_sigmas": True})
    asked = make_schedule(plain, 12, schedule=f"trailing+{transform}")
    np.testing.assert_array_equal(make_schedule(config, 12).sigmas, asked.sigmas)
    np.testing.assert_array_equal(make_schedule(config, 12).timesteps, asked.timesteps)
    # A requested schedule overrides the config, and a distilled model has no such choice.
    for arguments in ((12, "euler", "trailing"), (4, "lcm")):
        np.testing.assert_array_equal(make_schedule(config, *arguments).sigmas, make_schedule(plain, *arguments).sigmas)


def test_a_config_with_zero_terminal_snr_is_followed() -> None:
    config = Scheduler(beta_schedule="scaled_linear", timestep_spacing="trailing", rescale_betas_zero_snr=True)
    assert make_schedule(config, 12).sigmas[0] > 1000
