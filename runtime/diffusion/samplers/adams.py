"""Adams-Bashforth samplers: integrate the polynomial through the last slopes over the step.

dx = slope · dsigma, with a polynomial in sigma itself (LMS), in log sigma (DEIS) or in another time variable.
A new call has no earlier slopes, so a run that starts at a handoff begins at first order.
"""

__all__ = ["FEW_STEPS", "deis", "deis_comfyui", "lms", "lms_comfyui"]

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.runtime.diffusion.samplers.base import Ask, Asking, Latents, Sigmas, intervals, toward

_ABSCISSAE, _WEIGHTS = np.polynomial.legendre.leggauss(16)
POINTS = 10_000
FEW_STEPS = 15
"""With fewer steps, diffusers' DEIS ends with a first-order step."""


@dataclass(frozen=True)
class _Clock:
    """A time variable: `time(sigma)`, and `pace(time)`, the derivative of sigma with respect to it.

    Integrals are exact; with `points` they are sums over that many evenly spaced points, including both ends.
    """

    time: Callable[[float], float]
    pace: Callable[[NDArray[np.float64]], Any]
    points: int = 0


_SIGMA = _Clock(time=float, pace=np.ones_like)
_LOG_SIGMA = _Clock(time=math.log, pace=np.exp)


def lms(x: Latents, sigmas: Sigmas) -> Asking:
    """Linear multistep of order 4 in sigma (k-diffusion, diffusers' LMSDiscreteScheduler), also to sigma 0."""
    return _adams(x, sigmas, _SIGMA, [4] * (len(sigmas) - 1))


def lms_comfyui(x: Latents, sigmas: Sigmas) -> Asking:
    """Linear multistep as in ComfyUI: a step to sigma 0 returns the model's estimate."""
    return _adams(x, sigmas, _SIGMA, _orders(sigmas, 4))


def deis(x: Latents, sigmas: Sigmas, *, short_end: bool | None = None) -> Asking:
    """DEIS of order 2 (the rho-AB of arXiv 2204.13902 in log rho) as in diffusers' DEISMultistepScheduler.

    As in diffusers, a grid of fewer than 15 steps ends with a first-order step. If `sigmas` are a part of a grid,
    `short_end` states whether they end such a grid; None means that they are the whole grid.
    """
    orders = _orders(sigmas, 2)
    if orders and (len(orders) < FEW_STEPS if short_end is None else short_end):
        orders[-1] = 1
    return _adams(x, sigmas, _LOG_SIGMA, orders)


def deis_comfyui(x: Latents, sigmas: Sigmas) -> Asking:
    """DEIS of order 3 as in ComfyUI: the t-AB of arXiv 2204.13902 in the time of a VP process from 0.002 to 80.

    The integrals are ComfyUI's sums over 10000 equally weighted points.
    """
    return _adams(x, sigmas, _vp_clock(0.002, 80.0, 1e-3), _orders(sigmas, 3))


def _orders(sigmas: Sigmas, order: int) -> list[int]:
    return [order if after else 1 for _, after in intervals(sigmas)]


def _adams(x: Latents, sigmas: Sigmas, clock: _Clock, orders: Sequence[int]) -> Asking:
    """Yield the latents after each step i, along the polynomial through up to `orders[i]` slopes."""
    slopes: deque[Latents] = deque(maxlen=max(orders, default=1))
    nodes: deque[float] = deque(maxlen=slopes.maxlen)
    for order, (sigma, after) in zip(orders, intervals(sigmas), strict=True):
        denoised = yield Ask(x, sigma)
        slope = x - denoised
        slope *= 1.0 / sigma
        slopes.appendleft(slope)
        nodes.appendleft(sigma)
        if min(order, len(nodes)) == 1:
            x = toward(x, denoised, after / sigma)
        else:
            x = x.copy()
            for slope, weight in zip(slopes, _weights([*nodes][:order], after, clock), strict=False):
                x += slope * weight
        yield x


def _weights(nodes: Sequence[float], after: float, clock: _Clock) -> list[float]:
    """Return the weight of each slope in the integral from `nodes[0]` to `after` of the polynomial through them.

    By Gauss-Legendre quadrature over 16 points, which is exact for polynomials up to degree 31.
    """
    times, end = np.array([clock.time(node) for node in nodes]), clock.time(after)
    half = 0.5 * (end - times[0])
    points = times[0] + half * (1.0 + _ABSCISSAE)
    integral = half * _WEIGHTS * clock.pace(points) @ _polynomials(points, times)
    if clock.points:
        # A sum that includes both ends is the trapezoidal integral plus half of the values at the ends.
        ends = np.array([times[0], end])
        integral += (half * clock.pace(ends) @ _polynomials(ends, times) - integral) / clock.points
    weights: list[float] = integral.tolist()
    return weights


def _polynomials(points: NDArray[np.float64], times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (points, nodes): the Lagrange polynomial of each node, 1 at the node itself and 0 at the others."""
    gaps = np.subtract.outer(times, times)
    np.fill_diagonal(gaps, np.inf)
    factors = np.subtract.outer(points, times)[:, np.newaxis] / gaps
    # A node has no factor for itself.
    own = np.arange(len(times))
    factors[:, own, own] = 1.0
    product: NDArray[np.float64] = factors.prod(axis=2)
    return product


def _vp_clock(lowest: float, highest: float, start: float) -> _Clock:
    """Return the time t of the linear VP process, sigma² + 1 = exp(slope t² / 2 + base t), between `start` and 1."""
    low, high = math.log1p(lowest**2), math.log1p(highest**2)
    slope = 2.0 * (high - low / start) / (1.0 - start)
    base = high - 0.5 * slope

    def time(sigma: float) -> float:
        return (math.sqrt(base**2 + 2.0 * slope * math.log1p(sigma**2)) - base) / slope

    def pace(t: NDArray[np.float64]) -> NDArray[np.float64]:
        exponent = 0.5 * slope * t**2 + base * t
        derivative: NDArray[np.float64] = (slope * t + base) * np.exp(exponent) / (2.0 * np.sqrt(np.expm1(exponent)))
        return derivative

    return _Clock(time, pace, POINTS)
