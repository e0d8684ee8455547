"""Euler's method over a few training timesteps, whole or fractional: enough to lead UNets to real activations."""

__all__ = ["Euler"]

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines.manifest import Scheduler

Latents = NDArray[np.float32]


class Euler:
    """diffusers' ``EulerDiscreteScheduler`` on the grid `timesteps`, from high noise to low.

    Source: Karras et al., arXiv 2206.00364, algorithm 1 without churn.
    """

    def __init__(self, scheduler: Scheduler, timesteps: Sequence[float]) -> None:
        self.timesteps = np.array(timesteps, dtype=np.float32)
        training = _training_sigmas(scheduler)
        self.sigmas = np.append(np.interp(self.timesteps, np.arange(len(training)), training), 0.0)

    def start(self, noise: Latents) -> Latents:
        """Return what noise of unit variance begins as."""
        return (noise * np.sqrt(self.sigmas[0] ** 2 + 1)).astype(np.float32)

    def scaled(self, x: Latents, i: int) -> Latents:
        """Return what the UNet is shown of the latents before step `i`."""
        return (x / np.sqrt(self.sigmas[i] ** 2 + 1)).astype(np.float32)

    def step(self, x: Latents, prediction: Latents, i: int, prediction_type: str) -> Latents:
        """Return the latents after step `i`, along the UNet's `prediction`."""
        sigma, following = self.sigmas[i], self.sigmas[i + 1]
        if prediction_type == "epsilon":
            denoised = x - sigma * prediction
        elif prediction_type == "v_prediction":
            denoised = x / (sigma**2 + 1) - prediction * (sigma / np.sqrt(sigma**2 + 1))
        else:
            denoised = prediction
        return (x + (x - denoised) * ((following - sigma) / sigma)).astype(np.float32)


def _training_sigmas(scheduler: Scheduler) -> NDArray[np.float64]:
    """Return sqrt((1 - alpha_bar) / alpha_bar) of every training timestep."""
    power = 0.5 if scheduler.beta_schedule == "scaled_linear" else 1.0
    ends = scheduler.beta_start**power, scheduler.beta_end**power
    alphas = np.cumprod(1.0 - np.linspace(*ends, scheduler.num_train_timesteps) ** (1 / power))
    sigmas: NDArray[np.float64] = np.sqrt((1.0 - alphas) / alphas)
    return sigmas
