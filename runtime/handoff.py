"""Where the base stops and the refiner starts: one grid, cut once.

The base denoises the high noise, its latents go to the refiner as they are, neither decoded nor noised again.
diffusers states the place as a fraction of the training timesteps, ComfyUI as a number of steps; the two are
kept apart, since they differ (30 steps at 0.8 hand over after 23 steps).
"""

__all__ = ["step_at_fraction", "step_at_sigma"]

import numpy as np

from sdxl_trt.runtime.sigmas import Schedule


def step_at_fraction(schedule: Schedule, fraction: float) -> int:
    """Return how many steps the base takes for diffusers' ``denoising_end = denoising_start = fraction``.

    The base keeps the timesteps at or above the cutoff, the refiner those below it.
    """
    total = schedule.num_train_timesteps
    cutoff = round(total - fraction * total)
    return int(np.count_nonzero(schedule.timesteps >= cutoff))


def step_at_sigma(schedule: Schedule, sigma: float) -> int:
    """Return how many steps the base takes to the first sigma of the grid at or below `sigma`; all for none of them."""
    # A sigma that was read off the grid, in decimal digits, is that of the grid.
    return int(np.count_nonzero(schedule.sigmas[:-1] > sigma * (1.0 + 1e-5)))
