"""Euler's method over a few training timesteps, whole or fractional: enough to produce real UNet activations."""

__all__ = ["Euler"]

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines.bundle import Scheduler

Latents = NDArray[np.float32]


class Euler:
    """diffusers' ``EulerDiscreteScheduler``, or its ``EDMEulerScheduler``, on a grid from high noise to low.

    The argument `timesteps` is in training timesteps; EDM's schedule has none, so it gives positions between its ends.
    The attribute `timesteps` is the UNet's input. Source: Karras et al., arXiv 2206.00364, algorithm 1 without churn.
    """

    def __init__(self, scheduler: Scheduler, timesteps: Sequence[float]) -> None:
        places = np.array(timesteps, dtype=np.float32)
        self._data: float | None = None
        if scheduler.edm is not None:
            self._data = scheduler.edm.sigma_data
            low, high = scheduler.edm.sigma_min, scheduler.edm.sigma_max
            sigmas = low * (high / low) ** (places.astype(np.float64) / scheduler.num_train_timesteps)
        else:
            training = _training_sigmas(scheduler)
            sigmas = np.interp(places, np.arange(len(training)), training)
        self.timesteps = (0.25 * np.log(sigmas)).astype(np.float32) if scheduler.told_log_sigma else places
        self.sigmas = np.append(sigmas, 0.0)

    def start(self, noise: Latents) -> Latents:
        """Return the initial latents for `noise` of unit variance."""
        return (noise * np.sqrt(self.sigmas[0] ** 2 + 1)).astype(np.float32)

    def scaled(self, x: Latents, i: int) -> Latents:
        """Return the latents before step `i`, scaled as the UNet's input."""
        return (x / np.sqrt(self.sigmas[i] ** 2 + (self._data or 1.0) ** 2)).astype(np.float32)

    def step(self, x: Latents, prediction: Latents, i: int, prediction_type: str) -> Latents:
        """Return the latents after step `i` with the UNet's `prediction`."""
        sigma, following = self.sigmas[i], self.sigmas[i + 1]
        if self._data is not None:
            variance = sigma**2 + self._data**2
            sign = 1 if prediction_type == "epsilon" else -1
            answer = prediction * (sign * sigma * self._data / np.sqrt(variance))
            denoised = x * (self._data**2 / variance) + answer
        elif prediction_type == "epsilon":
            denoised = x - sigma * prediction
        elif prediction_type == "v_prediction":
            denoised = x / (sigma**2 + 1) - prediction * (sigma / np.sqrt(sigma**2 + 1))
        else:
            denoised = prediction
        return (x + (x - denoised) * ((following - sigma) / sigma)).astype(np.float32)


def _training_sigmas(scheduler: Scheduler) -> NDArray[np.float64]:
    """Return sqrt((1 - alpha_bar) / alpha_bar) of every training timestep."""
    if scheduler.trained_betas is not None:
        alphas = np.cumprod(1.0 - np.array(scheduler.trained_betas))
        given: NDArray[np.float64] = np.sqrt((1.0 - alphas) / alphas)
        return given
    power = 0.5 if scheduler.beta_schedule == "scaled_linear" else 1.0
    ends = scheduler.beta_start**power, scheduler.beta_end**power
    alphas = np.cumprod(1.0 - np.linspace(*ends, scheduler.num_train_timesteps) ** (1 / power))
    sigmas: NDArray[np.float64] = np.sqrt((1.0 - alphas) / alphas)
    return sigmas
