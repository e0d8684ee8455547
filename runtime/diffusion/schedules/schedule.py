"""The noise schedule: the sigmas of a run, and the timestep that the model receives for each of them."""

__all__ = ["Schedule", "make_comfyui_schedule", "make_schedule"]

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.bundle import Edm, Scheduler
from sdxl_trt.runtime.diffusion.schedules.comfyui import comfyui_sigmas
from sdxl_trt.runtime.diffusion.schedules.diffusers import (
    FAMILIES,
    diffusers_grid,
    edm_grid,
    log_timesteps,
    parse_schedule,
)
from sdxl_trt.runtime.diffusion.schedules.training import (
    Table,
    comfyui_log_sigmas,
    comfyui_training_sigmas,
    fractional_timesteps,
    nearest_timesteps,
    training_sigmas,
)


@dataclass(frozen=True)
class Schedule:
    """A run's grid: `timesteps` (steps,) and `sigmas` (steps + 1,), float32, falling.

    The last sigma is 0, except for grids that end at the training's lowest sigma: diffusers' DEIS, and others if the
    config says so.
    """

    timesteps: NDArray[np.float32]
    sigmas: NDArray[np.float32]
    num_train_timesteps: int
    initial_scale: float
    """The factor on unit-variance noise that starts the run."""
    training: Table
    """The sigma of every training timestep, from low noise to high."""
    final_scale: float = 1.0
    """The factor on the last latents before they are decoded: 1, except for grids that end above sigma 0 in the
    variance-preserving scale."""
    logs: Table | None = None
    """The log of every training sigma as ComfyUI computes it; None for diffusers' grids."""
    told_log_sigma: bool = False
    """Whether the model receives log(sigma) / 4 instead of a timestep."""
    variance_preserving: bool = False
    """Whether diffusers' class for the sampler keeps the latents divided by sqrt(1 + sigma²)."""
    sigma_data: float | None = None
    """The standard deviation of clean latents that scales an EDM model's input and output; None for other models."""

    @property
    def steps(self) -> int:
        """Return the number of steps."""
        return len(self.timesteps)

    def last(self, steps: int) -> "Schedule":
        """Return the grid of the last `steps` of this one, which starts from noise at its first sigma."""
        if steps >= self.steps:
            return self
        sigmas = self.sigmas[-(steps + 1) :]
        return replace(self, timesteps=self.timesteps[-steps:], sigmas=sigmas, initial_scale=float(sigmas[0]))

    def timestep(self, sigma: float) -> np.float32:
        """Return the timestep of `sigma` on the grid, or off the grid the one among the training sigmas.

        Between two training timesteps it is interpolated in log sigma, or the nearer one on a schedule of ComfyUI's.
        """
        known = self._timesteps.get(sigma)
        if known is not None:
            return known
        if self.logs is not None:
            return np.float32(nearest_timesteps(np.array([sigma]), self.logs)[0])
        position = int(np.argmin(np.abs(self.sigmas[:-1] - sigma)))
        if math.isclose(self.sigmas[position], sigma, rel_tol=1e-6):
            return np.float32(self.timesteps[position])
        if self.told_log_sigma:
            return np.float32(log_timesteps(np.array(sigma)))
        return np.float32(fractional_timesteps(np.array([sigma]), self.training)[0])

    @cached_property
    def _timesteps(self) -> dict[float, np.float32]:
        """The timestep of every sigma of the grid; of equal sigmas, that of the first."""
        return dict(zip(self.sigmas[-2::-1].tolist(), self.timesteps[::-1], strict=True))


def make_schedule(scheduler: Scheduler, steps: int, sampler: str = "euler", schedule: str = "") -> Schedule:
    """Return the grid of diffusers' scheduler class for `sampler`, with this config and `steps`.

    `schedule` is ``SPACING[+TRANSFORM]``, or "" for the config's. Raises UsageError for an unsupported number of
    steps, beta schedule, spacing or transform, KeyError for an unknown sampler.
    """
    family = FAMILIES[sampler]
    if scheduler.edm is not None:
        return _edm_schedule(scheduler, scheduler.edm, steps, schedule, ends_low=family.ends_low(scheduler))
    usual = (scheduler.timestep_spacing, family.transform(scheduler))
    spacing, transform = parse_schedule(schedule) if schedule else usual
    training = training_sigmas(scheduler, zero_terminal_snr=scheduler.rescale_betas_zero_snr)
    timesteps, sigmas = diffusers_grid(family, spacing, transform, steps, training, scheduler)
    timesteps = log_timesteps(sigmas[:-1]) if scheduler.told_log_sigma else timesteps
    highest, lowest = float(sigmas[0]), float(sigmas[-1])
    # `leading` starts below the highest sigma, so the noised latents still contain the data's unit variance.
    unit = family.variance_preserving or spacing == "leading"
    return Schedule(
        timesteps.astype(np.float32),
        sigmas.astype(np.float32),
        scheduler.num_train_timesteps,
        initial_scale=math.sqrt(highest**2 + 1.0) if unit else highest,
        training=training,
        final_scale=1.0 / math.sqrt(lowest**2 + 1.0) if family.variance_preserving else 1.0,
        variance_preserving=family.variance_preserving,
        told_log_sigma=scheduler.told_log_sigma,
    )


def _edm_schedule(scheduler: Scheduler, edm: Edm, steps: int, schedule: str, *, ends_low: bool) -> Schedule:
    """Return the grid of diffusers' EDM classes, the same for all samplers."""
    if schedule:
        raise UsageError(f"--schedule {schedule}: the bundle's model has EDM's own schedule; leave it out")
    sigmas = edm_grid(edm, steps, ends_low=ends_low)
    return Schedule(
        log_timesteps(sigmas[:-1]).astype(np.float32),
        sigmas.astype(np.float32),
        scheduler.num_train_timesteps,
        initial_scale=math.hypot(edm.sigma_max, 1.0),
        training=sigmas[-2::-1].astype(np.float32),
        told_log_sigma=True,
        sigma_data=edm.sigma_data,
    )


def make_comfyui_schedule(
    scheduler: Scheduler,
    steps: int,
    sampler: str = "euler",
    schedule: str = "normal",
    *,
    zero_terminal_snr: bool = False,
) -> Schedule:
    """Return the grid of ComfyUI's scheduler `schedule` for `sampler`; `ddim_uniform` and `beta` may change `steps`.

    Raises UsageError for an unsupported number of steps, beta schedule or name, and for a model that receives log
    sigmas.
    """
    if scheduler.told_log_sigma:
        raise UsageError("--compat comfyui: the bundle's model has EDM's schedule, which is not supported in ComfyUI's"
                         " mode; leave the option out")  # fmt: skip
    training = comfyui_training_sigmas(scheduler, zero_terminal_snr=zero_terminal_snr)
    logs = comfyui_log_sigmas(scheduler, zero_terminal_snr=zero_terminal_snr)
    sigmas = comfyui_sigmas(schedule, sampler, steps, training, logs)
    highest, most = float(sigmas[0]), float(training[-1])
    # At the highest training sigma, up to rounding, ComfyUI scales the noise to include the latents' unit variance.
    unit = highest > most or math.isclose(highest, most, rel_tol=1e-5)
    return Schedule(
        nearest_timesteps(sigmas[:-1], logs).astype(np.float32),
        sigmas,
        scheduler.num_train_timesteps,
        initial_scale=math.sqrt(highest**2 + 1.0) if unit else highest,
        training=training,
        logs=logs,
    )
