"""Draw with an exported bundle, for `evaluate`: one request per caption, through the project's own runtime."""

__all__ = ["engine_pair"]

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sdxl_trt.benchmarks.model_card.cases import DrawSettings, Generator
from sdxl_trt.runtime import Request, open_bundle


@contextmanager
def engine_pair(bundle: Path) -> Iterator[Generator]:
    """Open `bundle` and yield a generator of pictures; its engines stay loaded until the end."""
    with open_bundle(bundle, residency="resident") as pipeline:

        def draw(prompts: list[str], seeds: list[int], settings: DrawSettings) -> npt.NDArray[np.uint8]:
            pictures = []
            for prompt, seed in zip(prompts, seeds, strict=True):
                request = Request(
                    prompt,
                    seed=seed,
                    steps=settings.steps,
                    handoff=settings.handoff,
                    guidance=settings.guidance,
                    aesthetic_score=settings.aesthetic,
                    negative_aesthetic_score=settings.negative_aesthetic,
                )
                pictures += [np.asarray(picture.image) for picture in pipeline.generate(request)]
            return np.stack(pictures)

        yield draw
