"""What the scores of many pictures say: the share that is right, means, and paired differences with intervals."""

__all__ = ["Pixels", "Row", "paired_effect", "psnr", "quality", "share_right", "wilson"]

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from sdxl_trt.mini.score import Score

Pixels = npt.NDArray[np.uint8]
Row = dict[str, Any]


def share_right(scored: Iterable[Score]) -> Row:
    """Return the percentage right, overall with its 95 % Wilson interval and for each part of a caption."""
    all_scored = list(scored)
    count, right = len(all_scored), sum(one.right for one in all_scored)
    low, high = wilson(right, count)
    parts = ("shape", "colour", "background", "size", "position")
    each = {part: 100 * float(np.mean([getattr(one, part) for one in all_scored])) for part in parts}
    return {"count": count, "right": 100 * right / count, "low": 100 * low, "high": 100 * high, **each}


def quality(scored: Iterable[Score]) -> Row:
    """Return the means of the three quality measures over the pictures."""
    all_scored = list(scored)
    names = ("sharpness", "colour_error", "damage")
    return {name: float(np.mean([getattr(one, name) for one in all_scored])) for name in names}


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a proportion (Wilson 1927)."""
    z = 1.96
    share = hits / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return float(centre - half), float(centre + half)


def paired_effect(before: list[Score], after: list[Score], name: str) -> Row:
    """Return a measure's mean change from before to after, on the same seeds: 95 % bootstrap interval, Cohen's d."""
    difference = np.array([getattr(b, name) - getattr(a, name) for a, b in zip(before, after, strict=True)])
    rng = np.random.default_rng(0)
    means = rng.choice(difference, (4000, len(difference))).mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    spread = float(difference.std(ddof=1))
    mean = float(difference.mean())
    return {"mean": mean, "low": float(low), "high": float(high), "d": mean / spread if spread else 0.0}


def psnr(one: Pixels, other: Pixels) -> float:
    """Return the PSNR of two pictures in dB; 99 for equal ones."""
    error = float(np.square(one.astype(np.float64) - other).mean())
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))
