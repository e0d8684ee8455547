"""The embedded bundle is what export makes of the embedded weights, and it draws without torch."""

from pathlib import Path

import numpy as np
import pytest

from sdxl_trt.engines.bundle import read_bundle
from sdxl_trt.export import Options, export_bundle
from sdxl_trt.mini.embedded import bundle_path
from sdxl_trt.mini.score import score
from sdxl_trt.runtime import Request, open_bundle


@pytest.mark.slow
def test_the_bundle_is_what_export_makes_of_the_weights(tmp_path: Path) -> None:
    made = export_bundle("mini", "mini", tmp_path / "bundle", Options(precision="fp16")).manifest
    kept = read_bundle(bundle_path()).manifest
    assert set(made.components) == set(kept.components)
    for name, component in made.components.items():
        assert component.weights.sha256 == kept.components[name].weights.sha256, name
        assert component.graph.sha256 == kept.components[name].graph.sha256, name
    assert made.tokenizers == kept.tokenizers
    assert (made.base, made.refiner, made.note) == (kept.base, kept.refiner, kept.note)


@pytest.mark.slow
def test_the_defaults_answer_the_prompt() -> None:
    prompts = ["a large red circle on a blue background", "a yellow square on a green background"]
    with open_bundle() as pipeline:
        for prompt in prompts:
            (picture,) = pipeline.generate(Request(prompt, seed=7))
            assert picture.image.size == (128, 128)
            assert score(np.asarray(picture.image), prompt).right, prompt
