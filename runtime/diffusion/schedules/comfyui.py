"""ComfyUI's nine schedules over the model's training sigmas.

All cover the full range of sigmas and end at 0. `ddim_uniform` and `beta` may differ from the requested number of
steps. What torch computes in float32 is computed in float32: the last bit of a sigma decides between two equally near
timesteps, and changes a Brownian path.
"""

__all__ = ["COMFYUI_SCHEDULES", "DISCARDING", "comfyui_sigmas"]

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines import UsageError
from sdxl_trt.runtime.diffusion.schedules import curves as sigma_spans
from sdxl_trt.runtime.diffusion.schedules.training import Table
from sdxl_trt.runtime.float32 import exp32, linspace32, power32, tan32

Sigmas = NDArray[np.float32]

DISCARDING = frozenset({"dpm_2", "dpm_2_ancestral", "uni_pc", "uni_pc_bh2"})
"""Samplers for which ComfyUI makes one step more and drops the last sigma before 0."""


def comfyui_sigmas(schedule: str, sampler: str, steps: int, training: Table, logs: Table) -> NDArray[np.float32]:
    """Return the falling sigmas, the last of them 0, of ComfyUI's scheduler `schedule` for `sampler`.

    `training` is ComfyUI's table of sigmas, `logs` its table of their logarithms. Raises UsageError for an unknown
    schedule, and for a number of steps that the schedule does not support.
    """
    if schedule not in COMFYUI_SCHEDULES:
        raise UsageError(f"--schedule {schedule!r} is unknown; choose one of: {', '.join(COMFYUI_SCHEDULES)}")
    discard = sampler in DISCARDING
    # ComfyUI divides by steps - 1.
    least, most = 2 - discard if schedule == "kl_optimal" else 1, len(training) - discard
    if not least <= steps <= most:
        raise UsageError(f"--steps {steps}: choose {least} to {most} with --schedule {schedule}")
    sigmas = COMFYUI_SCHEDULES[schedule](_Table(training, logs), steps + discard)
    falling = np.append(sigmas[:-1] if discard else sigmas, np.float32(0.0))
    return falling.astype(np.float32)


@dataclass(frozen=True)
class _Table:
    sigmas: Table
    logs: Table

    @property
    def ends(self) -> tuple[float, float]:
        """Return the highest and the lowest sigma."""
        return float(self.sigmas[-1]), float(self.sigmas[0])

    def at(self, timesteps: Sigmas) -> Sigmas:
        """Return the sigmas at fractional timesteps, interpolated in log sigma."""
        low, high = np.floor(timesteps).astype(int), np.ceil(timesteps).astype(int)
        weight = timesteps - np.floor(timesteps)
        return exp32((np.float32(1.0) - weight) * self.logs[low] + weight * self.logs[high])


def _simple(training: _Table, steps: int) -> Sigmas:
    stride = len(training.sigmas) / steps
    return training.sigmas[[-(1 + int(step * stride)) for step in range(steps)]]


def _sgm_uniform(training: _Table, steps: int) -> Sigmas:
    return training.at(linspace32(len(training.sigmas) - 1, 0, steps + 1)[:-1])


def _karras(training: _Table, steps: int) -> Sigmas:
    high, low = (end ** (1.0 / sigma_spans.RHO) for end in training.ends)
    return power32(np.float32(high) + linspace32(0, 1, steps) * np.float32(low - high), sigma_spans.RHO)


def _exponential(training: _Table, steps: int) -> Sigmas:
    high, low = training.ends
    return exp32(linspace32(math.log(high), math.log(low), steps))


def _ddim_uniform(training: _Table, steps: int) -> Sigmas:
    return training.sigmas[1 :: max(len(training.sigmas) // steps, 1)][::-1]


def _beta(training: _Table, steps: int) -> Sigmas:
    quantiles = sigma_spans.beta_quantile(1.0 - np.linspace(0.0, 1.0, steps, endpoint=False))
    timesteps = np.rint(quantiles * (len(training.sigmas) - 1)).astype(int)
    return training.sigmas[list(dict.fromkeys(timesteps.tolist()))]


def _normal(training: _Table, steps: int) -> Sigmas:
    return training.at(linspace32(len(training.sigmas) - 1, 0, steps))


def _linear_quadratic(training: _Table, steps: int) -> Sigmas:
    """Half of the steps remove 2.5 % of the noise linearly, the other half the rest along a parabola (Mochi)."""
    knee, threshold = steps // 2, 0.025
    step, rest = np.arange(steps), steps - knee
    slope = threshold / knee if knee else 0.0
    bend = (1.0 - threshold - slope * rest) / rest**2 if knee else 0.0
    beyond = np.maximum(step - knee, 0)
    removed = slope * step + bend * beyond**2
    sigmas: Sigmas = (1.0 - removed).astype(np.float32) * training.sigmas[-1]
    return sigmas


def _kl_optimal(training: _Table, steps: int) -> Sigmas:
    """Evenly spaced in arctan sigma (equation 21 of arXiv 2404.14507)."""
    high, low = (np.float32(math.atan(end)) for end in training.ends)
    share = np.arange(steps, dtype=np.float32) / np.float32(steps - 1)
    return tan32(share * low + (np.float32(1.0) - share) * high)


COMFYUI_SCHEDULES: dict[str, Callable[[_Table, int], Sigmas]] = {
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
