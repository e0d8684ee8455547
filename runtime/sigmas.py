"""The noise schedule: which sigmas a run visits, and which timestep the model knows each of them by."""

__all__ = ["Schedule", "make_schedule"]

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines.bundle import Scheduler
from sdxl_trt.engines.errors import UsageError


@dataclass(frozen=True)
class Schedule:
    """A run's grid: `timesteps` (steps,) and `sigmas` (steps + 1,), float32, from high noise to 0."""

    timesteps: NDArray[np.float32]
    sigmas: NDArray[np.float32]
    num_train_timesteps: int
    initial_scale: float
    """What unit-variance noise is multiplied by to start the run."""

    @property
    def steps(self) -> int:
        """Return the number of steps."""
        return len(self.timesteps)

    def timestep(self, sigma: float) -> np.float32:
        """Return the timestep at which the grid has `sigma`; between two of the grid's, on a log-sigma line."""
        position = int(np.argmin(np.abs(self.sigmas[:-1] - sigma)))
        if np.isclose(self.sigmas[position], sigma, rtol=1e-6, atol=0):
            return np.float32(self.timesteps[position])
        logs = np.log(self.sigmas[-2::-1].astype(np.float64))
        return np.float32(np.interp(np.log(sigma), logs, self.timesteps[::-1]))


def make_schedule(scheduler: Scheduler, steps: int) -> Schedule:
    """Return the grid of diffusers' ``EulerDiscreteScheduler`` with this config and `steps`.

    Raises UsageError for a number of steps, beta schedule or spacing that it cannot have.
    """
    total = scheduler.num_train_timesteps
    if not 1 <= steps <= total:
        raise UsageError(f"--steps {steps}: choose 1 to {total}")
    training = _training_sigmas(scheduler)
    timesteps = _spaced(scheduler, steps)
    sigmas = np.interp(timesteps, np.arange(total), training).astype(np.float32)
    sigmas = np.append(sigmas, np.float32(0.0))
    highest = float(sigmas.max())
    # `leading` starts below the highest sigma, so that the noised latents still hold the data's unit variance.
    scale = highest if scheduler.timestep_spacing in ("linspace", "trailing") else float(np.sqrt(highest**2 + 1.0))
    return Schedule(timesteps.astype(np.float32), sigmas, total, scale)


def _training_sigmas(scheduler: Scheduler) -> NDArray[np.float64]:
    """Return sqrt((1 - alpha_bar) / alpha_bar) of every training timestep, from low noise to high."""
    start, end, total = scheduler.beta_start, scheduler.beta_end, scheduler.num_train_timesteps
    if scheduler.beta_schedule == "scaled_linear":
        betas = _linspace(start**0.5, end**0.5, total) ** 2
    elif scheduler.beta_schedule == "linear":
        betas = _linspace(start, end, total)
    else:
        raise UsageError(f"beta_schedule {scheduler.beta_schedule!r} is not supported; scaled_linear and linear are")
    # Rounded where torch rounds: float32 betas, a cumulative product in double that is stored in float32.
    alphas = np.cumprod((np.float32(1.0) - betas).astype(np.float64)).astype(np.float32)
    sigmas: NDArray[np.float64] = np.sqrt((np.float32(1.0) - alphas) / alphas).astype(np.float64)
    return sigmas


def _linspace(start: float, end: float, count: int) -> NDArray[np.float32]:
    values: NDArray[np.float32] = np.linspace(start, end, count, dtype=np.float32)
    return values


def _spaced(scheduler: Scheduler, steps: int) -> NDArray[np.float64]:
    """Return the visited timesteps (table 2 of arXiv 2305.08891), from high noise to low."""
    total, spacing = scheduler.num_train_timesteps, scheduler.timestep_spacing
    if spacing == "leading":
        return np.arange(steps, dtype=np.float64)[::-1] * (total // steps) + scheduler.steps_offset
    if spacing == "trailing":
        return np.arange(total, 0, -total / steps).round()[:steps] - 1.0
    if spacing == "linspace":
        return np.linspace(0, total - 1, steps, dtype=np.float64)[::-1]
    raise UsageError(f"timestep_spacing {spacing!r} is unknown; leading, trailing and linspace are known")
