"""The grids of diffusers' scheduler classes: timesteps, sigmas, scale of the noise; zero terminal SNR; quantiles.

diffusers needs scipy for its beta schedules: tests/peers/test_k_diffusion.py compares them and the quantiles.
"""

from typing import Any

import diffusers
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_trt.engines.bundle.manifest import Scheduler
from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime.diffusion.schedules.curves import beta_quantile
from sdxl_trt.runtime.diffusion.schedules.diffusers import FAMILIES, SPACINGS, TRANSFORMS, parse_schedule
from sdxl_trt.runtime.diffusion.schedules.schedule import make_schedule
from sdxl_trt.runtime.diffusion.schedules.training import training_sigmas

# diffusers' own warnings: it passes torch tensors to np.array, and takes the logarithm of its last sigma, 0.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
]

SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
STEPS = [1, 2, 3, 4, 7, 14, 25, 30, 50, 99, 333, 999]
CLASSES = {
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "uni_pc": "UniPCMultistepScheduler",
    "deis": "DEISMultistepScheduler",
    "ddim": "DDIMScheduler",
}
OPTIONS = {"ddim": {"set_alpha_to_one": False}}
SIGMAS = 3e-6
"""Relative: the table is float32, and partly a difference of two numbers near 1."""
BETA_QUANTILES = {
    0.0: 0.0, 1e-6: 1.8558824624053061333e-10, 0.01: 0.00086123882154290682938, 0.25: 0.17568037865269502035, 0.5: 0.5,
    0.75: 0.82431962134730497965, 0.99: 0.99913876117845709317, 1.0: 1.0,
}  # fmt: skip
TIMESTEPS = 2e-3
"""For fractional timesteps: differences of float32 logarithms that are a few thousandths apart."""


def _reference(sampler: str, steps: int, **config: Any) -> tuple[Any, np.ndarray, np.ndarray]:
    """Return diffusers' scheduler, its timesteps and its sigmas, each sigma once."""
    scheduler = getattr(diffusers, CLASSES[sampler])(**SDXL, **OPTIONS.get(sampler, {}), **config)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.numpy().astype(np.float64)
    if sampler == "ddim":
        table = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt().numpy()
        return scheduler, timesteps, np.append(table[timesteps.astype(int)], table[0])
    sigmas = scheduler.sigmas.numpy()
    if sampler == "heun":
        timesteps, sigmas = timesteps[::2], np.append(sigmas[:-1:2], sigmas[-1])
    return scheduler, timesteps, sigmas


def _compare(sampler: str, spacing: str, transform: str, steps: int, zero_snr: bool = False) -> None:
    flags = {f"use_{transform}_{'lambdas' if transform == 'lu' else 'sigmas'}": True} if transform else {}
    flags |= {"rescale_betas_zero_snr": True} if zero_snr else {}
    reference, timesteps, sigmas = _reference(sampler, steps, timestep_spacing=spacing, **flags)
    name = f"{spacing}+{transform}" if transform else spacing
    ours = make_schedule(Scheduler(**SDXL, rescale_betas_zero_snr=zero_snr), steps, sampler, name)
    where = f"{sampler}, {name}, {steps} steps"
    # For some numbers of steps diffusers' trailing grid has one step more than requested, which ours omits.
    np.testing.assert_allclose(ours.timesteps, timesteps[:steps], rtol=0, atol=TIMESTEPS, err_msg=where)
    np.testing.assert_allclose(ours.sigmas[:-1], sigmas[:steps], rtol=2e-4 if zero_snr else SIGMAS, err_msg=where)
    assert ours.sigmas[-1] == pytest.approx(sigmas[-1], rel=SIGMAS), where
    variance_preserving = FAMILIES[sampler].variance_preserving
    scale = float(np.hypot(ours.sigmas[0], 1.0)) if variance_preserving else float(reference.init_noise_sigma)
    assert ours.initial_scale == pytest.approx(scale, rel=2e-4 if zero_snr else SIGMAS), where
    assert (ours.timesteps.dtype, ours.sigmas.dtype) == (np.float32, np.float32)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", CLASSES)
def test_the_spacing_is_the_classes(sampler: str, spacing: str) -> None:
    for steps in STEPS:
        _compare(sampler, spacing, "", steps)


@pytest.mark.parametrize("transform", ["karras", "exponential", "lu"])
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "uni_pc", "deis"])
def test_the_transform_is_the_classes(sampler: str, transform: str) -> None:
    if transform == "lu" and sampler != "dpmpp_2m":
        pytest.skip("only DPMSolverMultistepScheduler supports it")
    # A single step of diffusers' transformed DEIS has zero length: it repeats the only sigma.
    for steps in (1, 2, 5, 14, 25, 30, 50)[sampler == "deis" :]:
        for spacing in SPACINGS:
            _compare(sampler, spacing, transform, steps)


@pytest.mark.parametrize("sampler", ["dpm_2", "dpm_2_ancestral"])
@pytest.mark.parametrize("schedule", ["leading", "trailing", "linspace", "leading+karras", "linspace+exponential"])
def test_the_grids_of_kdpm2_are_diffusers(sampler: str, schedule: str) -> None:
    """The class takes a tenth of a second to construct, so it is compared for one number of steps."""
    spacing, _, transform = schedule.partition("+")
    flags = {f"use_{transform}_sigmas": True} if transform else {}
    kind = diffusers.KDPM2DiscreteScheduler if sampler == "dpm_2" else diffusers.KDPM2AncestralDiscreteScheduler
    reference = kind(**SDXL, timestep_spacing=spacing, **flags)
    reference.set_timesteps(22)
    ours = make_schedule(Scheduler(**SDXL), 22, sampler, schedule)
    np.testing.assert_allclose(ours.timesteps, reference.timesteps[::2], rtol=0, atol=TIMESTEPS)
    np.testing.assert_allclose(ours.sigmas[:-1], reference.sigmas[:-2:2], rtol=SIGMAS)
    if transform != "karras":  # which rounds also the timesteps of the ancestral middles, the next sigmas
        high, low = ours.sigmas[:-2], ours.sigmas[1:-1]
        middles = np.sqrt(high * low) if sampler == "dpm_2" else low
        found = [float(ours.timestep(float(sigma))) for sigma in middles]
        np.testing.assert_allclose(found, reference.timesteps[1::2], rtol=0, atol=TIMESTEPS)


def test_lcm_takes_its_timesteps_from_the_solver_of_its_distillation() -> None:
    for steps in range(1, 51):
        reference = diffusers.LCMScheduler(**SDXL)
        reference.set_timesteps(steps)
        ours = make_schedule(Scheduler(**SDXL), steps, "lcm", "trailing")
        np.testing.assert_array_equal(ours.timesteps, reference.timesteps, err_msg=f"{steps} steps")
        table = ((1 - reference.alphas_cumprod) / reference.alphas_cumprod).sqrt().numpy()
        np.testing.assert_allclose(ours.sigmas, [*table[reference.timesteps.numpy()], 0.0], rtol=SIGMAS)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m", "uni_pc"])
def test_sigmas_with_zero_terminal_snr_are_diffusers(sampler: str, spacing: str) -> None:
    for steps in (1, 2, 8, 30):
        _compare(sampler, spacing, "", steps, zero_snr=True)


def test_a_run_with_zero_terminal_snr_starts_from_pure_noise() -> None:
    table = training_sigmas(Scheduler(**SDXL), zero_terminal_snr=True)
    assert table[-1] == pytest.approx(4096, rel=1e-6)
    assert table[0] == pytest.approx(float(training_sigmas(Scheduler(**SDXL))[0]), rel=1e-5)
    assert (np.diff(table) > 0).all()


def test_published_numbers() -> None:
    """The table of the design: 14 steps of SDXL's own config."""
    schedules = {sampler: make_schedule(Scheduler(**SDXL), 14, sampler, "leading") for sampler in FAMILIES}
    ends = {name: (int(found.timesteps[0]), int(found.timesteps[-1])) for name, found in schedules.items()}
    for sampler in ("euler", "heun", "ddim"):
        assert ends[sampler] == (924, 1)
    for sampler in ("dpmpp_2m", "uni_pc", "deis"):
        assert ends[sampler] == (925, 67)
    for sampler in ("ddim", "deis"):
        assert schedules[sampler].sigmas[-1] == pytest.approx(0.0292, abs=1e-4)
    assert make_schedule(Scheduler(**SDXL), 14, "euler", "karras").sigmas[0] == pytest.approx(9.49, abs=5e-3)
    assert make_schedule(Scheduler(**SDXL), 14, "dpmpp_2m", "karras").sigmas[0] == pytest.approx(14.61, abs=5e-3)


@pytest.mark.parametrize("sampler", FAMILIES)
@pytest.mark.parametrize("schedule", [*SPACINGS, *(f"{s}+{t}" for s in SPACINGS for t in TRANSFORMS)])
def test_any_sampler_on_any_schedule_falls_to_its_end(sampler: str, schedule: str) -> None:
    if sampler == "lcm" and "+" in schedule:
        with pytest.raises(UsageError, match="lcm runs on the timesteps of its distillation"):
            make_schedule(Scheduler(**SDXL), 4, sampler, schedule)
        return
    for steps in (1, 2, 9, 30):
        found = make_schedule(Scheduler(**SDXL), steps, sampler, schedule)
        assert (found.steps, len(found.sigmas)) == (steps, steps + 1)
        assert (np.diff(found.sigmas[:-1]) < 0).all()
        assert found.sigmas[-1] <= found.sigmas[-2]
        assert [found.timestep(float(sigma)) for sigma in found.sigmas[:-1]] == found.timesteps.tolist()


def test_schedules_are_parsed() -> None:
    assert parse_schedule("trailing") == ("trailing", "")
    assert parse_schedule("trailing+beta") == ("trailing", "beta")
    assert parse_schedule("karras") == ("leading", "karras")


@pytest.mark.parametrize("text", ["", "cosine", "leading+", "+karras", "karras+leading", "karras+beta", "leading+x+y"])
def test_an_unknown_schedule_names_the_known_ones(text: str) -> None:
    with pytest.raises(UsageError, match=r"choose one of: leading, trailing, linspace, each also with \+karras"):
        parse_schedule(text)


@pytest.mark.parametrize(
    ("sampler", "schedule", "steps", "most"),
    [("dpmpp_2m", "leading", 1000, 999), ("dpmpp_2m", "trailing", 1001, 1000), ("lcm", "leading", 51, 50)],
)
def test_too_many_steps_for_a_class_name_the_range(sampler: str, schedule: str, steps: int, most: int) -> None:
    assert make_schedule(Scheduler(**SDXL), most, sampler, schedule).steps == most
    with pytest.raises(UsageError, match=f"--steps {steps}: choose 1 to {most}"):
        make_schedule(Scheduler(**SDXL), steps, sampler, schedule)


def test_quantiles_are_those_of_the_beta_distribution() -> None:
    """Against mpmath, solved to 40 digits."""
    found = beta_quantile(np.array([*BETA_QUANTILES]))
    np.testing.assert_allclose(found, [*BETA_QUANTILES.values()], rtol=1e-13, atol=0)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_quantiles_are_increasing_and_symmetric(values: list[float]) -> None:
    probabilities = np.array(sorted(values))
    found = beta_quantile(probabilities)
    assert ((found >= 0) & (found <= 1)).all()
    assert (np.diff(found) >= 0).all()
    np.testing.assert_allclose(beta_quantile(1 - probabilities), 1 - found, rtol=0, atol=1e-13)
