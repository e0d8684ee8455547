"""diffusers' inpainting pipelines of a pair, what they draw, and with which schedulers."""

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PROMPT, SEED = "a red fox in the snow", 2**33 + 11
SIDES = 64, 32
"""Width and height of the picture."""
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "dpm_2_ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "uni_pc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    # DDIM for SDXL: no clipping, which is for pixel models, and an end above sigma 0.
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "lcm": ("LCMScheduler", {}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One run: strength, handoff (None for the base alone, "refine" for the refiner alone), steps, and so on."""

    strength: float
    handoff: float | str | None = None
    steps: int = 8
    count: int = 1
    sampler: str = "euler"
    guidance: float = 5.0
    prediction: str = "epsilon"

    def __str__(self) -> str:
        return (
            f"{self.strength}-{self.handoff}-{self.steps}x{self.count}-{self.sampler}-{self.guidance}-{self.prediction}"
        )


def a_picture() -> np.ndarray:
    """Return a picture with edges and colours, like real ones."""
    width, height = SIDES
    y, x = np.mgrid[:height, :width]
    disc = np.hypot(y - height / 2, x - width / 3) < height / 3
    channels = [np.where(disc, 220, x * 3), np.where(disc, 60, y * 5), np.where((x // 8 + y // 8) % 2, 200, 30)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def a_mask() -> np.ndarray:
    """Return a mask with a soft edge, whose border follows no grid of latents."""
    width, height = SIDES
    y, x = np.mgrid[:height, :width]
    return np.clip(300 - 18 * np.hypot(y - 13, x - 35), 0, 255).astype(np.uint8)


class Experts:
    """diffusers' inpainting pipelines of base and refiner."""

    def __init__(self, base: Path, refiner: Path) -> None:
        from diffusers import StableDiffusionXLInpaintPipeline

        class Clean(StableDiffusionXLInpaintPipeline):  # type: ignore[misc]
            """Keeps `kept` outside the mask, if it is set, instead of the latents that it starts from."""

            kept: Any = None

            def prepare_latents(self, *arguments: Any, **settings: Any) -> Any:
                latents, noise, start = super().prepare_latents(*arguments, **settings)
                return latents, noise, start if self.kept is None else self.kept

        self.pipelines: dict[str, Any] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, folder in (("base", base), ("refiner", refiner)):
                extra = {"requires_aesthetics_score": name == "refiner"}
                kind = StableDiffusionXLInpaintPipeline if name == "base" else Clean
                self.pipelines[name] = kind.from_pretrained(folder, **extra)
                self.pipelines[name].set_progress_bar_config(disable=True)

    def run(self, case: Case, kept: Callable[[list[Any]], Any] | None = None) -> list[np.ndarray]:
        """Return the latents after each stage; `kept` makes what the refiner keeps, from the generators."""
        import diffusers
        import torch
        from PIL import Image

        generators = [torch.Generator().manual_seed(SEED + i) for i in range(case.count)]
        image: Any = [Image.fromarray(a_picture())] * case.count
        mask = [Image.fromarray(a_mask())] * case.count
        chain = {"refine": ["refiner"], None: ["base"]}.get(case.handoff, ["base", "refiner"])
        results: list[np.ndarray] = []
        for name in chain:
            pipeline = self.pipelines[name]
            kind, settings = SCHEDULERS[case.sampler]
            config = dict(pipeline.scheduler.config) | {"prediction_type": case.prediction}
            config = {key: value for key, value in config.items() if key not in ("algorithm_type", "clip_sample")}
            pipeline.scheduler = getattr(diffusers, kind).from_config(config, **settings)
            end = {"denoising_end": case.handoff} if name == "base" and case.handoff is not None else {}
            begin = {"denoising_start": case.handoff} if results else {"strength": case.strength}
            scores = {"aesthetic_score": 5.0, "negative_aesthetic_score": 3.0} if name == "refiner" else {}
            if results and kept is not None:
                pipeline.kept = kept(generators)
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image = pipeline(
                    [PROMPT] * case.count, image=image, mask_image=mask, negative_prompt=["blurry"] * case.count,
                    num_inference_steps=case.steps, guidance_scale=case.guidance, generator=generators,
                    height=SIDES[1], width=SIDES[0], output_type="latent", **begin, **end, **scores,
                ).images  # fmt: skip
            if name == "refiner":
                pipeline.kept = None
            results.append(image.numpy())
        return results
