"""Where a step of ComfyUI's samplers leads, computed in float32 as it does: the last bits decide.

The model is told the training timestep nearest to a middle sigma, and a Brownian path is drawn over the way there.
"""

__all__ = ["ancestral32", "half_way", "half_way_down"]

import numpy as np

from sdxl_trt.runtime.float32 import exp32, log32


def ancestral32(sigma: float, after: float) -> tuple[float, float]:
    """Return (down, up): denoise to `down`, then add noise of deviation `up`, and `after` is reached.

    A `down` that is far below `after` is what float32 leaves of a difference, down to 0.
    """
    before, reached = np.float32(sigma), np.float32(after)
    squares = before * before, reached * reached
    up = min(reached, np.sqrt(squares[1] * (squares[0] - squares[1]) / squares[0]))
    return float(np.sqrt(squares[1] - up * up)), float(up)


def half_way(sigma: float, after: float) -> float:
    """Return the middle of two sigmas on a line of logarithms, as DPM-Solver-2 of ComfyUI finds it; 0 before 0."""
    high, low = log32(sigma), log32(after)
    return float(exp32(low - np.float32(0.5) * (low - high))) if after else 0.0


def half_way_down(sigma: float, after: float) -> float:
    """Return the same as its DPM-Solver++ finds it: half of the step further on in t = -log sigma."""
    begin, end = -log32(sigma), -log32(after)
    return float(exp32(-(begin + np.float32(0.5) * (end - begin)))) if after else 0.0
