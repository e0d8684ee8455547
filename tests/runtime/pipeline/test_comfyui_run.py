"""ComfyUI mode in a pipeline: batches, pixels, and prompts that exceed the limits."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdxl_trt.engines.bundle.profile import Range, fixed
from sdxl_trt.engines.errors import SizeError, UsageError
from sdxl_trt.engines.plans.limits import PlanLimits
from sdxl_trt.runtime import Request, open_bundle
from sdxl_trt.runtime.comfyui.reader import read_workflow
from sdxl_trt.runtime.comfyui.requests import check_workflow, pair_request
from sdxl_trt.runtime.diffusion.noise.sources import BatchNoise
from sdxl_trt.runtime.pipeline import pipeline as pipeline_module
from sdxl_trt.runtime.pipeline.pipeline import Pipeline

SIDE = 32


@pytest.fixture(scope="module")
def opened(pairs: Callable[[str], Any]) -> Iterator[Pipeline]:
    with open_bundle(pairs("outline").bundle, residency="resident") as pipeline:
        yield pipeline


def test_the_noise_of_a_batch_does_not_depend_on_which_pictures_share_a_call(opened: Pipeline) -> None:
    request = Request("a red fox", compat="comfyui", steps=3, seed=5, count=3, width=SIDE, height=SIDE,
                      sampler="euler_ancestral", handoff=None)  # fmt: skip
    finals = []
    for at_once in (4, 2):
        pipeline = Pipeline(opened.pool, pictures_at_once=at_once)
        pictures = list(pipeline.generate(request))
        finals.append(pipeline.run.final)
        assert [picture.seed for picture in pictures] == [5, 5, 5]
    np.testing.assert_allclose(*finals, rtol=0, atol=1e-4)
    np.testing.assert_allclose(
        pipeline.run.initial, BatchNoise(5, 3).draw((4, SIDE // 2, SIDE // 2)), rtol=0, atol=1e-5
    )
    assert np.abs(finals[0][0] - finals[0][1]).max() > 0.1


def test_pixels_are_truncated(opened: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder returns a value nine tenths of the way between two pixel values."""
    value = np.float32(2 * 100.9 / 255 - 1)
    monkeypatch.setattr(pipeline_module, "decode_latents", lambda *_, **__: np.full((1, 3, 2, 2), value))
    pixels = []
    for compat in ("diffusers", "comfyui"):
        (picture,) = opened.generate(
            Request("a fox", compat=compat, steps=1, width=SIDE, height=SIDE, handoff=None, seed=0)
        )
        pixels.append(np.asarray(picture.image).max())
    assert pixels == [101, 100]


def test_a_prompt_of_book_length_is_refused_before_anything_is_loaded(opened: Pipeline) -> None:
    loads = list(opened.pool.loads)
    with pytest.raises(UsageError, match=r"a prompt takes \d+ chunks of 77 tokens; shorten it to 16"):
        list(opened.generate(Request("a fox " * 20_000, compat="comfyui", width=SIDE, height=SIDE)))
    assert opened.pool.loads == loads


def test_prompts_longer_than_the_plans_take_are_refused(opened: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = Range(min=77, opt=77, max=154)
    monkeypatch.setattr(
        opened.pool, "limits", PlanLimits(height=fixed(SIDE), width=fixed(SIDE), pictures=1, tokens=tokens)
    )
    request = Request("a fox " * 100, compat="comfyui", handoff=None)
    with pytest.raises(SizeError, match=r"take 231 tokens, but the plans 77 to 154; .*--tokens 77:77:231"):
        list(opened.generate(request))


def test_a_weight_that_overflows_is_refused_before_anything_is_loaded(opened: Pipeline) -> None:
    loads = list(opened.pool.loads)
    with pytest.raises(UsageError, match=r"a weight of 1e\+30 in the prompt; choose -10000 to 10000"):
        list(opened.generate(Request("a (red:1e30) fox", compat="comfyui", width=SIDE, height=SIDE)))
    assert opened.pool.loads == loads


def test_without_guidance_the_length_of_the_negative_prompt_does_not_matter(
    opened: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = Range(min=77, opt=77, max=154)
    monkeypatch.setattr(
        opened.pool, "limits", PlanLimits(height=fixed(SIDE), width=fixed(SIDE), pictures=1, tokens=tokens)
    )
    request = Request("a fox", negative="a fox " * 100, compat="comfyui", handoff=None, steps=1, guidance=1.0)
    assert len(list(opened.generate(request))) == 1


def test_a_refiner_draws_the_same_as_its_graph(opened: Pipeline, tmp_path: Path) -> None:
    """Without a seed of its own it restarts the base's stream, as a KSampler with that seed does."""
    request = Request("a red fox", compat="comfyui", steps=4, seed=5, count=2, width=SIDE, height=SIDE, handoff_step=2,
                      refiner_sampler="euler_ancestral", refiner_add_noise=True)  # fmt: skip
    graph = next(opened.generate(request)).graph
    assert graph is not None
    finals = [opened.run.final]
    (tmp_path / "graph.json").write_text(json.dumps(graph))
    workflow = read_workflow(tmp_path / "graph.json")
    again = pair_request(workflow, opened.manifest, check_workflow(workflow, opened.manifest))
    assert again is not None
    assert again.refiner_seed == 5
    list(opened.generate(again))
    finals.append(opened.run.final)
    np.testing.assert_array_equal(*finals)
