"""Brownian noise against torchsde itself, and through k-diffusion's and diffusers' samplers that use it."""

import warnings
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torchsde

from sdxl_trt.engines.bundle.manifest import Scheduler
from sdxl_trt.runtime.diffusion.noise.brownian import BrownianPath
from sdxl_trt.runtime.diffusion.noise.sources import BatchNoise, PictureNoise
from sdxl_trt.runtime.diffusion.samplers.registry import BROWNIAN, bind_sampler, brownian_span, drive
from sdxl_trt.runtime.diffusion.schedules.schedule import make_comfyui_schedule, make_schedule

SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SHAPE = (2, 4, 6, 6)
REQUIRED = 2e-6


@pytest.fixture(autouse=True)
def _ends_are_rounded() -> Iterator[None]:
    """Ignore torchsde's warning about sigmas that rounding puts beyond the ends of its tree by less than 1e-6."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Should have t", category=UserWarning)
        yield


def _denoise(x: Any, sigma: Any) -> Any:
    if isinstance(x, np.ndarray):
        return np.tanh(x / np.float32(1 + sigma**2)) + np.float32(0.1) * np.sin(x[..., ::-1])
    return torch.tanh(x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)) + 0.1 * torch.sin(x.flip(-1))


@pytest.mark.parametrize("seed", [0, 1, 42, 2**31 + 5, 2**32, 2**53 + 1, 2**64 - 1])
def test_any_interval_of_any_seed_matches_torchsde(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sigmas = np.sort(rng.uniform(0.03, 15, 9).astype(np.float32))[::-1]
    low, high = float(sigmas[-1]), float(sigmas[0])
    tree = torchsde.BrownianTree(torch.tensor(low), torch.zeros(SHAPE), torch.tensor(high), entropy=seed)
    path = BrownianPath(SHAPE, low, high, seed)
    for sigma, after in [*pairwise(sigmas.tolist()), (high, low), (float(sigmas[2]), float(sigmas[6]))]:
        expected = -tree(after, sigma).numpy() / np.sqrt(np.float32(sigma) - np.float32(after))
        np.testing.assert_allclose(path(sigma, after), expected, rtol=0, atol=REQUIRED)


@pytest.mark.parametrize("name", sorted(BROWNIAN))
@pytest.mark.parametrize("part", [slice(None), slice(4, None), slice(0, 6)])
def test_samplers_draw_what_k_diffusion_draws(name: str, part: slice, sampling: Any) -> None:
    """As in ComfyUI: one path per seed over the part's sigmas, for the whole batch."""
    grid = make_comfyui_schedule(Scheduler(**SDXL), 9, name, "karras").sigmas
    sigmas = grid[part]
    start = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32) * sigmas[0]
    span = brownian_span(name, sigmas, grid, comfyui=True)
    source = BatchNoise(11, len(start)).source(SHAPE[1:], slice(0, len(start)), span)
    *_, found = drive(bind_sampler(name, source, comfyui=True)(start, sigmas), _denoise)
    theirs = torch.from_numpy(sigmas)
    noise = sampling.BrownianTreeNoiseSampler(torch.from_numpy(start), theirs[theirs > 0].min(), theirs.max(), seed=11)
    expected = getattr(sampling, f"sample_{name}")(
        _denoise, torch.from_numpy(start), theirs, disable=True, noise_sampler=noise
    )
    # k-diffusion rounds the middle of a step differently, by up to 2e-6 in time.
    required = 1e-3 if name == "dpmpp_sde" else 3e-5
    assert float(np.abs(found - expected.numpy()).max()) <= required * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_dpmpp_sde_draws_what_diffusers_draws(spacing: str) -> None:
    """One path per picture's seed over the whole grid, as diffusers' `noise_sampler_seed` does."""
    seeds = [3, 4]
    scheduler = diffusers.DPMSolverSDEScheduler(**SDXL, timestep_spacing=spacing, noise_sampler_seed=seeds)
    scheduler.set_timesteps(9)
    schedule = make_schedule(Scheduler(**SDXL), 9, "dpmpp_sde", spacing)
    start = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    x = torch.from_numpy(start) * scheduler.init_noise_sigma

    def predict(sample: Any, timestep: float) -> Any:
        bent = np.tanh(sample) if isinstance(sample, np.ndarray) else torch.tanh(sample)
        return 0.7 * sample + 0.2 * bent + 0.1 * float(np.sin(timestep / 30))

    def denoise(x: np.ndarray, sigma: float) -> np.ndarray:
        answer = predict(x / np.float32(np.hypot(sigma, 1)), float(schedule.timestep(sigma))).astype(np.float32)
        return x - np.float32(sigma) * answer

    for t in scheduler.timesteps:
        x = scheduler.step(predict(scheduler.scale_model_input(x, t), float(t)), t, x, return_dict=False)[0]
    span = brownian_span("dpmpp_sde", schedule.sigmas, schedule.sigmas, comfyui=False)
    run = bind_sampler("dpmpp_sde", PictureNoise(seeds).source(SHAPE[1:], slice(0, 2), span))
    *_, found = drive(run(start * np.float32(schedule.initial_scale), schedule.sigmas), denoise)
    np.testing.assert_allclose(found, x.numpy(), rtol=0, atol=2e-3)
