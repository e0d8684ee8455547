"""Every sampler step by step against diffusers' scheduler, on that scheduler's own grid and in its own scale.

diffusers' LMS, DPMSolverSDE and beta schedules need scipy or torchsde: tests/peers/test_k_diffusion.py covers them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import schedulers

from sdxl_trt.engines.bundle.manifest import Scheduler
from sdxl_trt.runtime.diffusion.samplers.registry import TWO_CALLS, bind_sampler, drive
from sdxl_trt.runtime.diffusion.schedules.diffusers import FAMILIES
from sdxl_trt.runtime.diffusion.schedules.schedule import Schedule, make_schedule

# diffusers' own warnings: it passes torch tensors to np.array; KDPM2 takes the logarithm of sigma 0.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
]

SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SHAPE = (2, 4, 6, 6)
SEED = 20231


@dataclass(frozen=True)
class Case:
    """A sampler, its scheduler class with options, and the largest difference allowed.

    `required` is in units of the largest latent of the step, in the scheduler's scale.
    """

    sampler: str
    scheduler: str
    required: float
    options: dict[str, Any] = field(default_factory=dict)
    predictions: tuple[str, ...] = ("epsilon", "v_prediction")
    spacings: tuple[str, ...] = ("leading", "trailing", "linspace")
    transforms: tuple[str, ...] = ("karras", "exponential")
    karras: float = 0.0
    """The requirement with karras, if it differs."""


DDIM_END = {"set_alpha_to_one": False, "clip_sample": False}
SDE = {"algorithm_type": "sde-dpmsolver++"}
ALL = ("epsilon", "v_prediction", "sample")
CASES = [
    Case("euler", "EulerDiscreteScheduler", 5e-6, predictions=ALL),
    Case("euler_ancestral", "EulerAncestralDiscreteScheduler", 5e-6, transforms=()),
    Case("heun", "HeunDiscreteScheduler", 2e-5, predictions=ALL),
    Case("dpm_2", "KDPM2DiscreteScheduler", 1e-5),
    # The middle of its step is the next sigma. diffusers computes it as a difference of squares in float32, and with
    # karras does not round its timestep, while those of the grid are rounded.
    Case("dpm_2_ancestral", "KDPM2AncestralDiscreteScheduler", 5e-5, karras=3e-4),
    Case("dpmpp_2m", "DPMSolverMultistepScheduler", 1e-5, predictions=ALL, transforms=("karras", "exponential", "lu")),
    Case("dpmpp_2m_sde", "DPMSolverMultistepScheduler", 1e-5, SDE, ALL),
    Case("uni_pc", "UniPCMultistepScheduler", 3e-5, predictions=ALL),
    Case("deis", "DEISMultistepScheduler", 3e-5, predictions=ALL),
    # With other spacings diffusers' DDIM calls the model at other timesteps than it steps to.
    Case("ddim", "DDIMScheduler", 5e-6, DDIM_END, ALL, ("leading",), ()),
    # diffusers mixes in at most (0.5 / 190)² of the noisy latents.
    Case("lcm", "LCMScheduler", 3e-5, predictions=ALL, spacings=("leading",), transforms=()),
]


def _model(sample: Any, timestep: float) -> Any:
    """Return a smooth function of all inputs, in numpy and in torch."""
    numpy = isinstance(sample, np.ndarray)
    turned = sample[..., ::-1] if numpy else sample.flip(-1)
    bent = np.tanh(sample) if numpy else torch.tanh(sample)
    return 0.5 * sample + 0.2 * turned + 0.2 * bent + 0.1 * float(np.sin(timestep / 30))


def _noises(shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(SEED)
    while True:
        yield rng.standard_normal(shape).astype(np.float32)


def _denoiser(schedule: Schedule, prediction: str) -> Callable[[np.ndarray, float], np.ndarray]:
    def denoise(x: np.ndarray, sigma: float) -> np.ndarray:
        root = np.float32(np.sqrt(sigma**2 + 1))
        answer = _model(x / root, float(schedule.timestep(sigma))).astype(np.float32)
        if prediction == "epsilon":
            return x - np.float32(sigma) * answer
        if prediction == "v_prediction":
            return x / root**2 - answer * (np.float32(sigma) / root)
        return answer

    return denoise


def _ours(case: Case, schedule: Schedule, prediction: str, start: np.ndarray) -> list[np.ndarray]:
    """Return the latents before the first step and after each, in the scale of diffusers' scheduler."""
    noises = _noises(SHAPE)
    run = bind_sampler(case.sampler, lambda sigma, after: next(noises))
    x = start * np.float32(schedule.initial_scale)
    trail = [x, *drive(run(x, schedule.sigmas), _denoiser(schedule, prediction))]
    if not FAMILIES[case.sampler].variance_preserving:
        return trail
    return [x / np.sqrt(sigma**2 + 1) for x, sigma in zip(trail, schedule.sigmas, strict=True)]


def _theirs(case: Case, scheduler: Any, start: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Return the same from diffusers; for schedulers with two calls a step, only whole steps."""
    noises, module = _noises(SHAPE), __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: torch.from_numpy(next(noises)))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    x = torch.from_numpy(start) * scheduler.init_noise_sigma
    trail = [x.numpy()]
    for t in scheduler.timesteps:
        answer = _model(scheduler.scale_model_input(x, t), float(t))
        x = scheduler.step(answer, t, x, return_dict=False)[0]
        trail.append(x.numpy())
    return [trail[0], *trail[2::2], trail[-1]] if case.sampler in TWO_CALLS else trail


@cache  # KDPM2 takes a tenth of a second to construct; set_timesteps resets it
def _scheduler(name: str, config: tuple[tuple[str, Any], ...]) -> Any:
    return getattr(diffusers, name)(**dict(config))


def _check(case: Case, steps: int, prediction: str, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spacing, _, transform = schedule.partition("+")
    config = SDXL | {"prediction_type": prediction, "timestep_spacing": spacing}
    flags = {f"use_{transform}_{'lambdas' if transform == 'lu' else 'sigmas'}": True} if transform else {}
    scheduler = _scheduler(case.scheduler, tuple((config | case.options | flags).items()))
    scheduler.set_timesteps(steps)
    start = np.random.default_rng(steps).standard_normal(SHAPE).astype(np.float32)
    ours = _ours(case, make_schedule(Scheduler(**config), steps, case.sampler, schedule), prediction, start)
    theirs = _theirs(case, scheduler, start, monkeypatch)
    required = (transform == "karras" and case.karras) or case.required
    assert len(ours) == len(theirs) == steps + 1
    for step, (x, reference) in enumerate(zip(ours, theirs, strict=True)):
        measured = float(np.abs(x - reference).max() / max(1.0, np.abs(reference).max()))
        where = f"{case.sampler}, {schedule}, {prediction}, after step {step} of {steps}"
        assert measured <= required, f"{where}: measured {measured:.2e}, required {required:.0e}"
        assert x.dtype == np.float32


@pytest.mark.parametrize("steps", [1, 2, 3, 14, 15])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.sampler)
def test_every_spacing_step_by_step(case: Case, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for spacing in case.spacings:
        for prediction in case.predictions:
            _check(case, steps, prediction, spacing, monkeypatch)


@pytest.mark.parametrize("steps", [2, 9])
@pytest.mark.parametrize("case", [case for case in CASES if case.transforms], ids=lambda case: case.sampler)
def test_every_transform_step_by_step(case: Case, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for transform in case.transforms:
        for spacing in case.spacings:
            _check(case, steps, "epsilon", f"{spacing}+{transform}", monkeypatch)


def test_ddim_is_diffusers_if_the_steps_divide_the_training_timesteps(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = (case for case in CASES if case.sampler == "ddim")
    for steps in (1, 2, 5, 10, 20, 50):
        _check(case, steps, "epsilon", "trailing", monkeypatch)


def test_no_sampler_of_diffusers_is_left_out() -> None:
    """Samplers without a class in diffusers, or with one that needs scipy or torchsde, are named here."""
    elsewhere = {"lms", "dpmpp_sde", "dpmpp_2s_ancestral", "dpmpp_3m_sde", "res_multistep"}
    assert {case.sampler for case in CASES} | elsewhere == set(FAMILIES)


def test_diffusers_third_order_sde_is_not_k_diffusions() -> None:
    """Why `dpmpp_3m_sde` has no case above: in so small a step the oldest estimate must weigh little, but does not."""
    solver = schedulers.DPMSolverMultistepScheduler(**SDXL, **SDE, solver_order=3)
    solver.set_timesteps(999)
    solver._step_index = 500
    oldest, none = torch.ones(1), torch.zeros(1)
    moved = solver.multistep_dpm_solver_third_order_update([oldest, none, none], sample=none, noise=none)
    assert abs(float(moved)) > 0.1
