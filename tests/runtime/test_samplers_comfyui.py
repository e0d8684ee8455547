"""The samplers that are ComfyUI's alone, or another there, against golden vectors of golden/make_comfyui.py."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdxl_trt.runtime.noise_sources import BatchNoise
from sdxl_trt.runtime.samplers import COMFYUI, SAMPLERS, bind_sampler

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("comfyui.json").read_text(encoding="utf-8"))
REQUIRED = 2e-6
"""In units of the largest latent: ours are float32, the golden ones were computed in double."""


def _denoise(x: np.ndarray, sigma: float) -> np.ndarray:
    return np.tanh(x / np.float32(1 + sigma**2)) + np.float32(0.1) * np.sin(x)


def _no_noise(sigma: float, after: float) -> np.ndarray:
    raise AssertionError("a deterministic sampler asked for noise")


@pytest.mark.parametrize("golden", GOLDEN["trails"], ids=lambda g: f"{g['sampler']}-to-{g['sigmas'][-1]}")
def test_step_by_step(golden: dict[str, Any]) -> None:
    name, sigmas = golden["sampler"], np.array(golden["sigmas"], np.float32)
    start = np.array(GOLDEN["start"], np.float32)
    trail = list(bind_sampler(name, _no_noise, comfyui=True)(_denoise, start, sigmas))
    for step, (x, expected) in enumerate(zip(trail, golden["trail"], strict=True), start=1):
        measured = float(np.abs(x - expected).max() / max(1.0, np.abs(expected).max()))
        assert measured <= REQUIRED, f"{name}, after step {step}: measured {measured:.1e}, required {REQUIRED:.0e}"


def _euler_ancestral(x: torch.Tensor, sigmas: torch.Tensor, seed: int) -> torch.Tensor:
    """Sample as ComfyUI does on a CPU, where the noise of the way is that of the seed's successor."""
    generator = torch.Generator().manual_seed(seed + 1)
    for sigma, after in pairwise(sigmas):
        denoised = torch.from_numpy(_denoise(x.numpy(), float(sigma)))
        up = min(after, (after**2 * (sigma**2 - after**2) / sigma**2) ** 0.5)
        down = (after**2 - up**2) ** 0.5
        if down == 0:
            return denoised
        x = x + (x - denoised) / sigma * (down - sigma) + torch.randn(x.size(), generator=generator) * up
    return x


@pytest.mark.parametrize("seed", [0, 1234567, 2**32 - 1, 2**63])
def test_ancestral_noise_is_that_of_the_next_seed(seed: int) -> None:
    sigmas = np.array(GOLDEN["trails"][0]["sigmas"], np.float32)
    noise = BatchNoise(seed, 2)
    start = noise.draw((4, 6, 6)) * sigmas[0]
    source = noise.source(start.shape[1:], slice(0, 2))
    *_, found = bind_sampler("euler_ancestral", source, comfyui=True)(_denoise, start, sigmas)
    expected = _euler_ancestral(torch.from_numpy(start), torch.from_numpy(sigmas), seed)
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=2e-5)


def test_every_variant_of_comfyui_has_golden_vectors() -> None:
    assert {golden["sampler"] for golden in GOLDEN["trails"]} == {*COMFYUI, "res_multistep"}


@pytest.mark.parametrize("name", [name for name in COMFYUI if name in SAMPLERS])
def test_they_are_others_than_diffusers(name: str) -> None:
    sigmas = np.array([14.6, 5.0, 2.0, 0.9, 0.4, 0.1, 0.0], np.float32)
    start = np.array(GOLDEN["start"], np.float32)
    ends = [list(bind_sampler(name, _no_noise, comfyui=flag)(_denoise, start, sigmas))[-1] for flag in (False, True)]
    assert np.abs(ends[0] - ends[1]).max() > 1e-4
