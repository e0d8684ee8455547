"""The embedded bundle draws what the prompt asks for."""

from dataclasses import replace

import numpy as np
import pytest

from sdxl_trt.mini import lora_path
from sdxl_trt.mini.score import border_width, score_picture
from sdxl_trt.runtime import Request, open_bundle
from sdxl_trt.runtime.adapters import LoraUse


@pytest.mark.slow
def test_pictures_with_the_defaults_match_the_prompt() -> None:
    prompts = ["a large red circle on a blue background", "a yellow square on a green background"]
    with open_bundle() as pipeline:
        for prompt in prompts:
            (picture,) = pipeline.generate(Request(prompt, seed=7))
            assert picture.image.size == (128, 128)
            assert score_picture(np.asarray(picture.image), prompt).right, prompt


@pytest.mark.slow
def test_the_lora_draws_a_white_border_and_nothing_without_it() -> None:
    prompt = "a large red circle on a yellow background"
    usual = Request(prompt, seed=7, steps=15, handoff=None)
    with open_bundle() as pipeline:

        def border(*loras: LoraUse) -> float:
            (picture,) = pipeline.generate(replace(usual, loras=loras))
            return border_width(np.asarray(picture.image), prompt)

        plain, half, whole = border(), border(LoraUse(str(lora_path()), 0.5)), border(LoraUse(str(lora_path())))
    assert plain < 0.2
    assert 0.5 < half < 3
    assert whole > 4
