"""The sigmas that a model was trained on, and their timesteps."""

__all__ = [
    "Table",
    "comfyui_log_sigmas",
    "comfyui_training_sigmas",
    "fractional_timesteps",
    "nearest_timesteps",
    "training_sigmas",
]

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.bundle import Scheduler
from sdxl_trt.runtime.float32 import log32

Table = NDArray[np.float32]
"""The sigma of every training timestep (total,), from low noise to high."""

SMALLEST_ALPHA_BAR = 2.0**-24
"""diffusers' last alpha_bar with zero terminal SNR: sigma 4096 instead of infinity."""
COMFYUI_SMALLEST_ALPHA_BAR = 4.8973451890853435e-08


def training_sigmas(scheduler: Scheduler, *, zero_terminal_snr: bool = False) -> Table:
    """Return sqrt((1 - alpha_bar) / alpha_bar) of every training timestep as diffusers computes it, in float32.

    With `zero_terminal_snr` the betas are rescaled so that no signal is left at the last timestep (algorithm 1 of
    arXiv 2305.08891). Raises UsageError for a beta schedule that is not supported.
    """
    betas = _betas(scheduler, np.float32)
    if zero_terminal_snr:
        betas = _rescaled(betas)
    alphas = _cumulative(np.float32(1.0) - betas)
    if zero_terminal_snr:
        alphas[-1] = SMALLEST_ALPHA_BAR
    sigmas: Table = np.sqrt((np.float32(1.0) - alphas) / alphas)
    return sigmas


def comfyui_training_sigmas(scheduler: Scheduler, *, zero_terminal_snr: bool = False) -> Table:
    """Return the same as ComfyUI computes it: in float64, rounded once; its zero-SNR rescaling ends at sigma 4518.7."""
    return _comfyui_sigmas(scheduler, zero_terminal_snr=zero_terminal_snr).astype(np.float32)


def comfyui_log_sigmas(scheduler: Scheduler, *, zero_terminal_snr: bool = False) -> Table:
    """Return the log of every training sigma as ComfyUI computes it: from the float64 sigmas, rounded once."""
    return np.log(_comfyui_sigmas(scheduler, zero_terminal_snr=zero_terminal_snr)).astype(np.float32)


def fractional_timesteps(sigmas: NDArray[np.float64], training: Table) -> NDArray[np.float64]:
    """Return the fractional timesteps of `sigmas`, interpolated in log sigma, as diffusers does."""
    wanted = np.log(np.maximum(sigmas, 1e-10))
    timesteps: NDArray[np.float64] = np.interp(wanted, np.log(training), np.arange(len(training)))
    return timesteps


def nearest_timesteps(sigmas: NDArray[np.floating], logs: Table) -> NDArray[np.float64]:
    """Return the whole training timesteps whose log sigma in `logs` is nearest to that of `sigmas`, as in ComfyUI.

    The rounding of float32 decides between two equally near ones, so it happens where torch rounds.
    """
    nearest: NDArray[np.intp] = np.abs(log32(sigmas)[:, np.newaxis] - logs).argmin(axis=1)
    return nearest.astype(np.float64)


def _comfyui_sigmas(scheduler: Scheduler, *, zero_terminal_snr: bool) -> NDArray[np.float64]:
    alphas = np.cumprod(1.0 - _betas(scheduler, np.float64))
    if zero_terminal_snr:
        root = np.sqrt(alphas)
        alphas = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        alphas[-1] = COMFYUI_SMALLEST_ALPHA_BAR
    sigmas: NDArray[np.float64] = np.sqrt((1.0 - alphas) / alphas)
    return sigmas


def _betas(scheduler: Scheduler, dtype: type[np.float32] | type[np.float64]) -> NDArray[np.floating]:
    if scheduler.trained_betas is not None:
        return np.array(scheduler.trained_betas, dtype=dtype)
    start, end, total = scheduler.beta_start, scheduler.beta_end, scheduler.num_train_timesteps
    if scheduler.beta_schedule == "scaled_linear":
        roots: NDArray[np.floating] = np.linspace(start**0.5, end**0.5, total, dtype=dtype)
        return roots**2
    if scheduler.beta_schedule == "linear":
        return np.linspace(start, end, total, dtype=dtype)
    raise UsageError(f"beta_schedule {scheduler.beta_schedule!r} is not supported; scaled_linear and linear are")


def _rescaled(betas: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return betas whose alpha_bar is shifted to end at 0 and scaled to keep its start, in float32 as in torch."""
    root = np.sqrt(_cumulative(np.float32(1.0) - betas))
    first, last = root[0], root[-1]
    alpha_bar = ((root - last) * (first / (first - last))) ** 2
    return np.float32(1.0) - np.append(alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1])


def _cumulative(alphas: NDArray[np.floating]) -> Table:
    # Rounded where torch rounds: float32 factors, their product in double, stored in float32.
    return np.cumprod(alphas.astype(np.float64)).astype(np.float32)
