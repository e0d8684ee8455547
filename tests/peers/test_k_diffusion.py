"""Samplers and schedules against libraries that the ordinary tests do not have: k-diffusion, scipy, torchsde.

k-diffusion is installed without its dependencies: only its sampling module is loaded, with torchvision stubbed.
diffusers' LMS and DPMSolverSDE schedulers and its beta schedules are tested here because they need scipy or torchsde.
"""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_dpmsolver_sde
from scipy import integrate, stats

from sdxl_trt.engines.bundle.manifest import Scheduler
from sdxl_trt.runtime.diffusion.samplers.adams import _SIGMA, _weights
from sdxl_trt.runtime.diffusion.samplers.registry import STOCHASTIC, bind_sampler, drive
from sdxl_trt.runtime.diffusion.schedules.comfyui import comfyui_sigmas
from sdxl_trt.runtime.diffusion.schedules.curves import beta_quantile
from sdxl_trt.runtime.diffusion.schedules.diffusers import SPACINGS
from sdxl_trt.runtime.diffusion.schedules.schedule import make_schedule
from sdxl_trt.runtime.diffusion.schedules.training import comfyui_training_sigmas

SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SHAPE = (2, 4, 6, 6)
STEPS = [1, 2, 3, 9, 25]
NAMES = [
    "euler", "heun", "dpm_2", "lms", "dpmpp_2m", "euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral",
    "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde",
]  # fmt: skip
REQUIRED = 1e-5
"""Largest difference relative to the step's largest latent, in k-diffusion's scale, which is ours. k-diffusion runs in
double, so that the difference is the float32 rounding of our latents."""


def _denoise(x: Any, sigma: Any) -> Any:
    """Return a denoised estimate that depends on all of `x` and on `sigma`, for numpy and torch."""
    if isinstance(x, np.ndarray):
        return np.tanh(x / np.float32(1 + sigma**2)) + np.float32(0.1) * np.sin(x[..., ::-1])
    return torch.tanh(x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)) + 0.1 * torch.sin(x.flip(-1))


def _model(sample: Any, timestep: float) -> Any:
    bent = np.tanh(sample) if isinstance(sample, np.ndarray) else torch.tanh(sample)
    return 0.7 * sample + 0.2 * bent + 0.1 * float(np.sin(timestep / 30))


def _noises(seed: int = 3) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    while True:
        yield rng.standard_normal(SHAPE).astype(np.float32)


def _difference(found: np.ndarray, expected: Any) -> float:
    reference = np.asarray(expected)
    return float(np.abs(found - reference).max() / max(1.0, np.abs(reference).max()))


def _their_trail(sampling: ModuleType, name: str, start: np.ndarray, sigmas: np.ndarray, noise: Any) -> list[Any]:
    """Return the latents before every step, as the callback receives them, and the final ones."""
    trail: list[Any] = []
    extra = {"noise_sampler": noise} if name in STOCHASTIC else {}
    last = getattr(sampling, f"sample_{name}")(
        _denoise, torch.from_numpy(start).double(), torch.from_numpy(sigmas).double(), disable=True,
        callback=lambda state: trail.append(state["x"]), **extra,
    )  # fmt: skip
    return [*trail, last]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", NAMES)
def test_every_step_matches_k_diffusion(
    name: str, steps: int, sampling: ModuleType, measured: Callable[[str], None]
) -> None:
    grids = {spacing: make_schedule(Scheduler(**SDXL), steps, "euler", spacing).sigmas for spacing in SPACINGS}
    grids["karras"] = sampling.get_sigmas_karras(steps, 0.0292, 14.6146).numpy()
    grids["to a cut"] = grids["leading"][:-1] if steps > 1 else np.array([9.0, 2.0], np.float32)
    if steps == 1 and name in {"dpmpp_2m_sde", "dpmpp_3m_sde"}:
        grids = {"to a cut": grids["to a cut"]}  # k-diffusion fails on a single step to sigma 0
    worst = 0.0
    for grid, sigmas in grids.items():
        start = np.random.default_rng(steps).standard_normal(SHAPE).astype(np.float32) * sigmas[0]
        ours, theirs = _noises(), _noises()
        run = bind_sampler(name, lambda sigma, after, noises=ours: next(noises))
        trail = [start, *drive(run(start, sigmas), _denoise)]
        expected = _their_trail(
            sampling, name, start, sigmas, lambda a, b, noises=theirs: torch.from_numpy(next(noises))
        )
        assert len(trail) == len(expected)
        for step, (x, reference) in enumerate(zip(trail, expected, strict=True)):
            found = _difference(x, reference)
            worst = max(worst, found)
            where = f"{name} on {grid}, after step {step} of {steps}"
            assert found <= REQUIRED, f"{where}: measured {found:.1e}, required {REQUIRED:.0e}"
    measured(f"{name}, {steps} steps: k-diffusion, ours {worst:.1e}")


@pytest.mark.parametrize("name", ["dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"])
def test_brownian_noise_can_be_the_noise_source(name: str, sampling: ModuleType) -> None:
    """k-diffusion's and ComfyUI's source for these samplers, with consistent noise for overlapping intervals."""
    sigmas = make_schedule(Scheduler(**SDXL), 9, "euler", "leading").sigmas
    start = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32) * sigmas[0]
    ends = float(sigmas[-2]), float(sigmas[0])
    tree = sampling.BrownianTreeNoiseSampler(torch.from_numpy(start).double(), *ends, seed=11)
    run = bind_sampler(name, lambda sigma, after: tree(sigma, after).numpy().astype(np.float32))
    for x, reference in zip(
        [start, *drive(run(start, sigmas), _denoise)], _their_trail(sampling, name, start, sigmas, tree), strict=True
    ):
        # The tree rounds times by up to 1e-6, and the middle of a step is rounded differently.
        assert _difference(x, reference) <= 2e-4


def _diffusers_trail(scheduler: Any, start: np.ndarray, calls: int) -> list[np.ndarray]:
    scheduler.set_begin_index(0)
    x = torch.from_numpy(start) * scheduler.init_noise_sigma
    trail = [x.numpy()]
    for t in scheduler.timesteps:
        x = scheduler.step(_model(scheduler.scale_model_input(x, t), float(t)), t, x, return_dict=False)[0]
        trail.append(x.numpy())
    return trail if calls == 1 else [trail[0], *trail[2::2], trail[-1]]


@pytest.mark.parametrize("schedule", [*SPACINGS, "leading+karras", "leading+exponential", "trailing+beta"])
@pytest.mark.parametrize(
    ("name", "scheduler"), [("lms", "LMSDiscreteScheduler"), ("dpmpp_sde", "DPMSolverSDEScheduler")]
)
def test_diffusers_schedulers_that_need_scipy(
    name: str, scheduler: str, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = _noises()
    monkeypatch.setattr(
        scheduling_dpmsolver_sde, "BrownianTreeNoiseSampler", lambda *_: lambda a, b: torch.from_numpy(next(theirs))
    )
    spacing, _, transform = schedule.partition("+")
    flags = {f"use_{transform}_sigmas": True} if transform else {}
    reference = getattr(diffusers, scheduler)(**SDXL, timestep_spacing=spacing, **flags)
    for steps in (2, 3, 9, 20):
        reference.set_timesteps(steps)
        grid, ours = make_schedule(Scheduler(**SDXL), steps, name, schedule), _noises()

        def denoise(x: np.ndarray, sigma: float, grid: Any = grid) -> np.ndarray:
            answer = _model(x / np.float32(np.hypot(sigma, 1)), float(grid.timestep(sigma))).astype(np.float32)
            return x - np.float32(sigma) * answer

        theirs = _noises()
        start = np.random.default_rng(steps).standard_normal(SHAPE).astype(np.float32)
        expected = _diffusers_trail(reference, start, 2 if name == "dpmpp_sde" else 1)
        run = bind_sampler(name, lambda sigma, after, noises=ours: next(noises))
        x = start * np.float32(grid.initial_scale)
        for step, (found, wanted) in enumerate(zip([x, *drive(run(x, grid.sigmas), denoise)], expected, strict=True)):
            error = _difference(found, wanted)
            # With two steps, one goes from sigma 14.6 to 0.03: its deviation is a difference of squares in float32.
            required = 3e-4 if steps == 2 else 5e-5
            assert error <= required, f"{name}, {schedule}, step {step} of {steps}: {error:.1e} > {required:.0e}"


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("euler", "EulerDiscreteScheduler"), ("heun", "HeunDiscreteScheduler"), ("deis", "DEISMultistepScheduler"),
        ("dpmpp_2m", "DPMSolverMultistepScheduler"), ("uni_pc", "UniPCMultistepScheduler"),
    ],
)  # fmt: skip
def test_diffusers_beta_schedules(name: str, scheduler: str, spacing: str) -> None:
    reference = getattr(diffusers, scheduler)(**SDXL, timestep_spacing=spacing, use_beta_sigmas=True)
    for steps in (2, 5, 14, 25, 30, 50):
        reference.set_timesteps(steps)
        ours = make_schedule(Scheduler(**SDXL), steps, name, f"{spacing}+beta")
        every = slice(None, None, 2) if name == "heun" else slice(None)
        sigmas = reference.sigmas.numpy()[:-1][every]
        np.testing.assert_allclose(ours.sigmas[:-1], sigmas, rtol=3e-6, err_msg=f"{steps} steps")
        np.testing.assert_allclose(ours.timesteps, reference.timesteps[every], rtol=0, atol=2e-3)


def test_quantiles_equal_scipys() -> None:
    probabilities = np.concatenate([np.linspace(0, 1, 2001), np.logspace(-15, -1, 200)])
    expected = stats.beta.ppf(probabilities, 0.6, 0.6)
    np.testing.assert_allclose(beta_quantile(probabilities), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 30, 333, 999])
def test_comfyuis_beta_schedule_with_scipys_quantiles(steps: int) -> None:
    table = comfyui_training_sigmas(Scheduler(**SDXL))
    timesteps = np.rint(stats.beta.ppf(1 - np.linspace(0, 1, steps, endpoint=False), 0.6, 0.6) * 999)
    expected = table[sorted({int(t) for t in timesteps}, reverse=True)]
    np.testing.assert_array_equal(comfyui_sigmas("beta", "euler", steps, table), [*expected, 0.0])


def test_karras_and_exponential_equal_k_diffusions(sampling: ModuleType) -> None:
    table = comfyui_training_sigmas(Scheduler(**SDXL))
    ends = float(table[0]), float(table[-1])
    for steps in (1, 2, 20, 50):
        for name in ("karras", "exponential"):
            expected = getattr(sampling, f"get_sigmas_{name}")(steps, *ends).numpy()
            np.testing.assert_allclose(comfyui_sigmas(name, "euler", steps, table), expected, rtol=3e-6)


def test_weights_of_lms_equal_adaptive_quadrature() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        nodes = np.sort(rng.uniform(0.02, 15.0, 5))
        after, *past = (float(node) for node in nodes)
        for order in (2, 3, 4):
            used = past[:order]
            found = _weights(used, after, _SIGMA)
            for i, weight in enumerate(found):
                others = [node for j, node in enumerate(used) if j != i]
                wanted, _ = integrate.quad(
                    lambda t, i=i, used=used, others=others: np.prod([(t - o) / (used[i] - o) for o in others]),
                    used[0], after, epsabs=1e-12,
                )  # fmt: skip
                assert weight == pytest.approx(wanted, rel=1e-9, abs=1e-9)
