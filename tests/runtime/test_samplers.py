"""Samplers step by step against diffusers' schedulers, through a Denoiser on a made-up model."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler

from sdxl_trt.engines.base import Array
from sdxl_trt.engines.bundle import Scheduler, TensorSpec
from sdxl_trt.runtime.conditioning import Conditions
from sdxl_trt.runtime.denoiser import Denoiser
from sdxl_trt.runtime.handoff import split
from sdxl_trt.runtime.samplers import SAMPLERS, euler
from sdxl_trt.runtime.sigmas import make_schedule

# diffusers' own: it gives torch tensors to np.array.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SHAPE = (2, 4, 8, 8)


def _model(sample: Any, timestep: float) -> Any:
    """Answer with something that depends on everything, in numpy as in torch."""
    turned = sample[..., ::-1] if isinstance(sample, np.ndarray) else sample.flip(-1)
    return 0.6 * sample + 0.2 * turned + 0.1 * float(np.sin(timestep / 77))


class ModelEngine:
    """An engine that computes `_model`."""

    component = SimpleNamespace(input=lambda name: TensorSpec(name=name, dtype="float32", shape=("rows",)))

    def bind(self, constants: Mapping[str, Array]) -> None:
        self.constants = constants

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        timestep = inputs["timestep"]
        assert (timestep == timestep[0]).all()
        return {"out_sample": _model(inputs["sample"], float(timestep[0])).astype(np.float32)}


def _diffusers(config: dict[str, Any], steps: int, noise: np.ndarray) -> list[np.ndarray]:
    """Return the latents before the first step and after each one, as diffusers takes them."""
    scheduler = EulerDiscreteScheduler(**config)
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(noise) * scheduler.init_noise_sigma
    trail = [x.numpy()]
    for t in scheduler.timesteps:
        prediction = _model(scheduler.scale_model_input(x, t), float(t))
        x = scheduler.step(prediction, t, x, return_dict=False)[0]
        trail.append(x.numpy())
    return trail


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_euler_is_diffusers_step_by_step(prediction: str, spacing: str, steps: int, rng: np.random.Generator) -> None:
    config = SDXL | {"prediction_type": prediction, "timestep_spacing": spacing}
    noise = rng.standard_normal(SHAPE).astype(np.float32)
    schedule = make_schedule(Scheduler(**config), steps)
    denoise = Denoiser(ModelEngine(), schedule, Conditions({}, 1.0), prediction)
    start = noise * np.float32(schedule.initial_scale)
    trail = [start, *euler(denoise, start, schedule.sigmas)]
    expected = _diffusers(config, steps, noise)
    assert len(trail) == len(expected) == steps + 1
    for step, (x, reference) in enumerate(zip(trail, expected, strict=True)):
        assert x.dtype == np.float32
        np.testing.assert_allclose(x, reference, rtol=1e-4, atol=1e-4, err_msg=f"after step {step} of {steps}")


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("cut", [1, 5, 9])
def test_two_parts_of_a_grid_make_the_whole(name: str, cut: int, rng: np.random.Generator) -> None:
    schedule = make_schedule(Scheduler(**SDXL, timestep_spacing="leading"), 10)
    denoise = Denoiser(ModelEngine(), schedule, Conditions({}, 1.0), "epsilon")
    start = rng.standard_normal(SHAPE).astype(np.float32) * np.float32(schedule.initial_scale)
    whole = list(SAMPLERS[name](denoise, start, schedule.sigmas))
    before, after = split(schedule.sigmas, cut)
    first = list(SAMPLERS[name](denoise, start, before))
    both = first + list(SAMPLERS[name](denoise, first[-1], after))
    assert (len(first), len(both)) == (cut, 10)
    np.testing.assert_array_equal(both, whole)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_perfect_denoiser_gives_the_clean_latents(name: str, rng: np.random.Generator) -> None:
    """The last sigma is 0, so whoever knows the answer must end at it."""
    clean = rng.standard_normal(SHAPE).astype(np.float32)
    sigmas = make_schedule(Scheduler(**SDXL, timestep_spacing="leading"), 12).sigmas
    start = clean + rng.standard_normal(SHAPE).astype(np.float32) * sigmas[0]
    *_, last = SAMPLERS[name](lambda x, sigma: clean, start, sigmas)
    np.testing.assert_allclose(last, clean, atol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_leaves_its_input_alone_and_can_be_stopped(name: str) -> None:
    calls: list[float] = []

    def denoise(x: np.ndarray, sigma: float) -> np.ndarray:
        calls.append(sigma)
        return x * 0

    start = np.ones(SHAPE, np.float32)
    sampled = SAMPLERS[name](denoise, start, np.array([4, 2, 1, 0], np.float32))
    assert calls == [], "nothing runs before the first step is asked for"
    next(sampled)
    assert calls == [4.0]
    assert (start == 1).all()
