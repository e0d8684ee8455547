"""The samplers that are ComfyUI's alone, or another there, against golden vectors of golden/make_comfyui.py."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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


def test_every_variant_of_comfyui_has_golden_vectors() -> None:
    assert {golden["sampler"] for golden in GOLDEN["trails"]} == {*COMFYUI, "res_multistep"}


@pytest.mark.parametrize("name", [name for name in COMFYUI if name in SAMPLERS])
def test_they_are_others_than_diffusers(name: str) -> None:
    sigmas = np.array([14.6, 5.0, 2.0, 0.9, 0.4, 0.1, 0.0], np.float32)
    start = np.array(GOLDEN["start"], np.float32)
    ends = [list(bind_sampler(name, _no_noise, comfyui=flag)(_denoise, start, sigmas))[-1] for flag in (False, True)]
    assert np.abs(ends[0] - ends[1]).max() > 1e-4
