"""The embedded bundle draws what the prompt asks for."""

import numpy as np
import pytest

from sdxl_trt.mini.score.score import score_picture
from sdxl_trt.runtime import Request, open_bundle


@pytest.mark.slow
def test_pictures_with_the_defaults_match_the_prompt() -> None:
    prompts = ["a large red circle on a blue background", "a yellow square on a green background"]
    with open_bundle() as pipeline:
        for prompt in prompts:
            (picture,) = pipeline.generate(Request(prompt, seed=7))
            assert picture.image.size == (128, 128)
            assert score_picture(np.asarray(picture.image), prompt).right, prompt
