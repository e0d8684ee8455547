"""Draw with diffusers: the reference that every other implementation is compared with."""

__all__ = ["TorchPair"]

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

from sdxl_trt.benchmarks.model_card.cases import DrawSettings


class TorchPair:
    """Draws with the pair that `materialize` wrote: float32, on the CPU."""

    def __init__(self, base: Path, refiner: Path) -> None:
        """Load both pipelines."""
        self.base = StableDiffusionXLPipeline.from_pretrained(base)
        self.refiner = StableDiffusionXLImg2ImgPipeline.from_pretrained(refiner)
        self._kept: dict[object, torch.Tensor] = {}
        for pipeline in (self.base, self.refiner):
            pipeline.set_progress_bar_config(disable=True)

    def __call__(self, prompts: list[str], seeds: list[int], settings: DrawSettings) -> npt.NDArray[np.uint8]:
        """Return pictures `(n, 128, 128, 3)` uint8; each seed has its own generator."""
        common: dict[str, Any] = {
            "prompt": prompts,
            "num_inference_steps": settings.steps,
            "guidance_scale": settings.guidance,
        }
        if settings.handoff is None:
            return pixels(self.base(**common, generator=generators_of(seeds), output_type="pt").images)
        latents = self.base_latents(common, tuple(seeds), settings.handoff)
        refined = self.refiner(
            **common,
            image=latents,
            denoising_start=settings.handoff,
            aesthetic_score=settings.aesthetic,
            negative_aesthetic_score=settings.negative_aesthetic,
            output_type="pt",
        )
        return pixels(refined.images)

    def base_latents(self, common: dict[str, Any], seeds: tuple[int, ...], handoff: float) -> torch.Tensor:
        """Return the base's handoff latents, cached (4 KB a picture) for sweeps of the refiner's settings."""
        key = (repr(common), seeds, handoff)
        if key not in self._kept:
            drawn = self.base(**common, generator=generators_of(seeds), denoising_end=handoff, output_type="latent")
            self._kept[key] = drawn.images
        return self._kept[key]


def generators_of(seeds: Iterable[int]) -> list[torch.Generator]:
    """Return one generator per seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def pixels(images: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Return images `(n, 3, h, w)` in 0..1 as `(n, h, w, 3)` uint8, rounded."""
    found: npt.NDArray[np.uint8]
    found = images.permute(0, 2, 3, 1).mul(255).round().clamp(0, 255).to(torch.uint8).numpy()
    return found
