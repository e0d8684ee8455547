"""The targets of a step of ComfyUI's samplers, computed in float32 as ComfyUI does, because the last bits matter.

They decide which training timestep is nearest to a middle sigma, and which interval of a Brownian path is drawn.
"""

__all__ = ["ancestral32", "half_way", "half_way_down"]

import numpy as np

from sdxl_trt.runtime.float32 import exp32, log32


def ancestral32(sigma: float, after: float) -> tuple[float, float]:
    """Return (down, up): denoising to `down`, then adding noise of deviation `up`, reaches `after`.

    A `down` far below `after` suffers from cancellation in float32, and may become 0.
    """
    before, reached = np.float32(sigma), np.float32(after)
    squares = before * before, reached * reached
    up = min(reached, np.sqrt(squares[1] * (squares[0] - squares[1]) / squares[0]))
    return float(np.sqrt(squares[1] - up * up)), float(up)


def half_way(sigma: float, after: float) -> float:
    """Return the midpoint of two sigmas in log sigma, as ComfyUI's DPM-Solver-2 computes it; 0 if `after` is 0."""
    high, low = log32(sigma), log32(after)
    return float(exp32(low - np.float32(0.5) * (low - high))) if after else 0.0


def half_way_down(sigma: float, after: float) -> float:
    """Return the same as ComfyUI's DPM-Solver++ computes it: half a step from `sigma` in t = -log sigma."""
    begin, end = -log32(sigma), -log32(after)
    return float(exp32(-(begin + np.float32(0.5) * (end - begin)))) if after else 0.0
