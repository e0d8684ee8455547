"""The embedded pair's folders load in the oldest supported libraries, whose key names differ from today's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from sdxl_trt.mini import materialize
from sdxl_trt.mini.score.score import score_picture

CLASSES = {
    "base": diffusers.StableDiffusionXLPipeline,
    "refiner": diffusers.StableDiffusionXLImg2ImgPipeline,
}
PROMPT = "a large red star on a blue background"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("mini")
    materialize(target)
    return target


def _load(folder: Path, stage: str) -> Any:
    pipeline = CLASSES[stage].from_pretrained(folder / stage)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_old_libraries_are_installed() -> None:
    assert transformers.__version__.startswith("4.57.")
    assert diffusers.__version__.startswith("0.39.")


@pytest.mark.parametrize("stage", list(CLASSES))
def test_every_weight_is_loaded(folder: Path, stage: str) -> None:
    """transformers 4 fills missing keys with random numbers and only warns."""
    pipeline = _load(folder, stage)
    parts = [name for name in ("text_encoder", "text_encoder_2", "unet", "vae") if getattr(pipeline, name, None)]
    assert len(parts) == (4 if stage == "base" else 3)
    for part in parts:
        (file,) = (folder / stage / part).glob("*.safetensors")
        stored, loaded = load_file(file), getattr(pipeline, part).state_dict()
        assert set(loaded) - set(stored) == set()
        for name, tensor in loaded.items():
            assert torch.equal(tensor, stored[name].to(tensor.dtype)), f"{part}: {name}"


def test_the_pair_draws_what_the_prompt_says(folder: Path, measured: Callable[[str], None]) -> None:
    base, refiner = _load(folder, "base"), _load(folder, "refiner")
    settings: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 20}
    with torch.no_grad():
        latents = base(
            **settings, generator=torch.Generator().manual_seed(7), denoising_end=0.8, output_type="latent"
        ).images
        picture = refiner(**settings, image=latents, denoising_start=0.8).images[0]
    judged = score_picture(np.asarray(picture), PROMPT)
    seen = judged.reading
    measured(f"mini in diffusers {diffusers.__version__}: {seen.colour} {seen.shape} on {seen.background}")
    assert judged.right
