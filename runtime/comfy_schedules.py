"""ComfyUI's grids: nine ways to walk down the sigmas that the model was trained on.

All go over the full range of sigmas and end at 0. `ddim_uniform` and `beta` may take other than the asked number of
steps. Arithmetic that decides which training timestep is nearest is done in float32, as in torch.
"""

__all__ = ["COMFYUI_SCHEDULES", "DISCARDING", "comfyui_sigmas"]

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime import sigma_spans
from sdxl_trt.runtime.training_sigmas import Table

Sigmas = NDArray[np.floating]

DISCARDING = frozenset({"dpm_2", "dpm_2_ancestral", "uni_pc", "uni_pc_bh2"})
"""Samplers for which ComfyUI spaces one step more and leaves out the last sigma before 0."""


def comfyui_sigmas(schedule: str, sampler: str, steps: int, training: Table) -> NDArray[np.float32]:
    """Return the falling sigmas, the last of them 0, of ComfyUI's scheduler `schedule` for `sampler`.

    `training` is ComfyUI's table. Raises UsageError for an unknown schedule or a number of steps that it cannot have.
    """
    if schedule not in COMFYUI_SCHEDULES:
        raise UsageError(f"--schedule {schedule!r} is unknown; choose one of: {', '.join(COMFYUI_SCHEDULES)}")
    discard = sampler in DISCARDING
    most = len(training) - discard
    if not 1 <= steps <= most:
        raise UsageError(f"--steps {steps}: choose 1 to {most}")
    sigmas = COMFYUI_SCHEDULES[schedule](training, steps + discard)
    falling = np.append(sigmas[:-1] if discard else sigmas, 0.0)
    return falling.astype(np.float32)


def _simple(training: Table, steps: int) -> Sigmas:
    stride = len(training) / steps
    return training[[-(1 + int(step * stride)) for step in range(steps)]]


def _sgm_uniform(training: Table, steps: int) -> Sigmas:
    return _at(np.linspace(len(training) - 1, 0, steps + 1)[:-1], training)


def _karras(training: Table, steps: int) -> Sigmas:
    return sigma_spans.karras(float(training[-1]), float(training[0]), steps)


def _exponential(training: Table, steps: int) -> Sigmas:
    return sigma_spans.exponential(float(training[-1]), float(training[0]), steps)


def _ddim_uniform(training: Table, steps: int) -> Sigmas:
    return training[1 :: max(len(training) // steps, 1)][::-1]


def _beta(training: Table, steps: int) -> Sigmas:
    quantiles = sigma_spans.beta_quantile(1.0 - np.linspace(0.0, 1.0, steps, endpoint=False))
    timesteps = np.rint(quantiles * (len(training) - 1)).astype(int)
    return training[list(dict.fromkeys(timesteps.tolist()))]


def _normal(training: Table, steps: int) -> Sigmas:
    return _at(np.linspace(len(training) - 1, 0, steps), training)


def _linear_quadratic(training: Table, steps: int) -> Sigmas:
    """Half of the steps remove 2.5 % of the noise on a line, a parabola that goes on from it the rest (Mochi)."""
    knee, threshold = steps // 2, 0.025
    step, rest = np.arange(steps), steps - knee
    slope = threshold / knee if knee else 0.0
    bend = (1.0 - threshold - slope * rest) / rest**2 if knee else 0.0
    beyond = np.maximum(step - knee, 0)
    removed = slope * step + bend * beyond**2
    return (1.0 - removed) * float(training[-1])


def _kl_optimal(training: Table, steps: int) -> Sigmas:
    """Evenly spaced in arctan sigma (equation 21 of arXiv 2404.14507)."""
    return np.tan(np.linspace(math.atan(training[-1]), math.atan(training[0]), steps))


def _at(timesteps: NDArray[np.float64], training: Table) -> Sigmas:
    """Return the sigmas at fractional timesteps, on a log-sigma line."""
    times = timesteps.astype(np.float32)
    low, high = np.floor(times).astype(int), np.ceil(times).astype(int)
    weight = times - np.floor(times)
    logs = np.log(training.astype(np.float64)).astype(np.float32)
    sigmas: Sigmas = np.exp((np.float32(1.0) - weight) * logs[low] + weight * logs[high])
    return sigmas


COMFYUI_SCHEDULES: dict[str, Callable[[Table, int], Sigmas]] = {
    "simple": _simple,
    "sgm_uniform": _sgm_uniform,
    "karras": _karras,
    "exponential": _exponential,
    "ddim_uniform": _ddim_uniform,
    "beta": _beta,
    "normal": _normal,
    "linear_quadratic": _linear_quadratic,
    "kl_optimal": _kl_optimal,
}
