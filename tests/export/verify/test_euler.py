"""The recording's Euler steps against diffusers' scheduler."""

import warnings

import numpy as np
import pytest
import torch

from sdxl_trt.engines.bundle.manifest import Edm, Scheduler
from sdxl_trt.export.verify.euler import Euler

TIMES = [999.0, 751.3, 500.0, 250.25, 149.0, 50.3]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear"])
def test_steps_equal_diffusers(prediction_type: str, beta_schedule: str) -> None:
    from diffusers import EulerDiscreteScheduler

    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": beta_schedule}
    config["prediction_type"] = prediction_type
    # With any spacing but diffusers' default, the initial noise includes the data's unit variance.
    reference = EulerDiscreteScheduler(num_train_timesteps=1000, timestep_spacing="leading", **config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's warning about how the library makes arrays from tensors
        reference.set_timesteps(timesteps=TIMES)
    reference.set_begin_index(0)
    euler = Euler(Scheduler(num_train_timesteps=1000, **config), TIMES)
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(1, 4, 6, 5, generator=generator)
    x, found = noise * reference.init_noise_sigma, euler.start(noise.numpy())
    for i, timestep in enumerate(reference.timesteps):
        assert float(timestep) == euler.timesteps[i]
        shown = reference.scale_model_input(x, timestep)
        np.testing.assert_allclose(euler.scaled(found, i), shown.numpy(), rtol=2e-5, atol=2e-5)
        prediction = torch.randn(x.shape, generator=generator)
        x = reference.step(prediction, timestep, x).prev_sample
        found = euler.step(found, prediction.numpy(), i, prediction_type)
        np.testing.assert_allclose(found, x.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_edm_steps_equal_diffusers(prediction_type: str) -> None:
    from diffusers import EDMEulerScheduler

    reference = EDMEulerScheduler(sigma_schedule="exponential", prediction_type=prediction_type)
    reference.set_timesteps(6)
    euler = Euler(Scheduler(edm=Edm()), np.linspace(1000.0, 0.0, 6).tolist())
    np.testing.assert_allclose(euler.timesteps, reference.timesteps, rtol=1e-5)
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(1, 4, 6, 5, generator=generator)
    x, found = noise * reference.init_noise_sigma, euler.start(noise.numpy())
    for i, timestep in enumerate(reference.timesteps):
        shown = reference.scale_model_input(x, timestep)
        np.testing.assert_allclose(euler.scaled(found, i), shown.numpy(), rtol=2e-5, atol=2e-5)
        prediction = torch.randn(x.shape, generator=generator)
        x = reference.step(prediction, timestep, x).prev_sample
        found = euler.step(found, prediction.numpy(), i, prediction_type)
        np.testing.assert_allclose(found, x.numpy(), rtol=1e-4, atol=1e-4)
