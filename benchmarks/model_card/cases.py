"""The captions and seeds for evaluating the embedded pair."""

__all__ = ["CardCase", "DrawSettings", "Generator", "evaluation_cases"]

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sdxl_trt.mini.scenes import EVALUATION_SEEDS, HELD_OUT, draw_caption, sample_scene, training_pairs

HELD_OUT_OFFSET = 1_000_000
"""Index in `EVALUATION_SEEDS` at which the held-out cases start."""


@dataclass(frozen=True)
class DrawSettings:
    """Settings of a generator; `handoff` None means the base alone for all steps."""

    steps: int = 30
    handoff: float | None = 0.8
    guidance: float = 5.0
    aesthetic: float = 6.0
    negative_aesthetic: float = 2.5


@dataclass(frozen=True)
class CardCase:
    """One evaluation caption and the seed of its noise."""

    caption: str
    seed: int


Generator = Callable[[list[str], list[int], DrawSettings], npt.NDArray[np.uint8]]
"""Maps prompts, seeds and settings to pictures `(n, 128, 128, 3)` uint8."""


def evaluation_cases(count: int, held_out: bool = False) -> list[CardCase]:
    """Return evaluation captions of the training pairs or of the held-out ones; deterministic."""
    pairs = list(HELD_OUT) if held_out else training_pairs()
    made = []
    for i in range(count):
        seed = EVALUATION_SEEDS[i + HELD_OUT_OFFSET * held_out]
        rng = np.random.default_rng(seed)
        made.append(CardCase(draw_caption(sample_scene(rng, pairs).asked, rng, evaluation=True), seed))
    return made
