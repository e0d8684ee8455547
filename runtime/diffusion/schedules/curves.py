"""Sigmas spaced between two ends: the Karras, exponential and beta schedules."""

__all__ = ["beta", "beta_quantile", "exponential", "karras"]

import math

import numpy as np
from numpy.typing import NDArray

RHO = 7.0
SHAPE = 0.6
"""Both parameters of the beta distribution, as in diffusers and ComfyUI."""

Values = NDArray[np.float64]


def karras(highest: float, lowest: float, steps: int, rho: float = RHO) -> Values:
    """Return (steps,) sigmas, falling, evenly spaced in sigma^(1/rho) (equation 5 of arXiv 2206.00364)."""
    ramp = np.linspace(0.0, 1.0, steps)
    high, low = highest ** (1.0 / rho), lowest ** (1.0 / rho)
    sigmas: Values = (high + ramp * (low - high)) ** rho
    return sigmas


def exponential(highest: float, lowest: float, steps: int) -> Values:
    """Return (steps,) sigmas, falling, evenly spaced in log sigma."""
    sigmas: Values = np.exp(np.linspace(math.log(highest), math.log(lowest), steps))
    return sigmas


def beta(highest: float, lowest: float, steps: int) -> Values:
    """Return (steps,) sigmas, falling, at the quantiles of the beta distribution (arXiv 2407.12173)."""
    return lowest + beta_quantile(1.0 - np.linspace(0.0, 1.0, steps)) * (highest - lowest)


def beta_quantile(probabilities: Values) -> Values:
    """Return the quantiles of Beta(0.6, 0.6), as ``scipy.stats.beta.ppf`` does, to 1e-14.

    The distribution is symmetric, so only its lower half is inverted: by Newton's method in u = x^0.6, in which the
    distribution function is nearly linear.
    """
    lower = np.minimum(probabilities, 1.0 - probabilities)
    whole = math.gamma(SHAPE) ** 2 / math.gamma(2.0 * SHAPE)
    u = lower * SHAPE * whole
    for _ in range(6):
        x = u ** (1.0 / SHAPE)
        slope = (1.0 - x) ** (SHAPE - 1.0) / SHAPE
        u -= (_incomplete(x, u) - lower * whole) / slope
    x = np.clip(u, 0.0, None) ** (1.0 / SHAPE)
    # The median must be exact: it is a tie between two timesteps.
    return np.select([probabilities == 0.5, probabilities > 0.5], [0.5, 1.0 - x], x)


def _incomplete(x: Values, u: Values) -> Values:
    """Return the integral of (t (1 - t))^(0.6 - 1) up to x <= 1/2, as a power series; `u` is x^0.6."""
    total, term = np.zeros_like(x), np.ones_like(x)
    for n in range(60):
        total += term / (SHAPE + n)
        term *= x * (1.0 - SHAPE + n) / (n + 1.0)
    return total * u
