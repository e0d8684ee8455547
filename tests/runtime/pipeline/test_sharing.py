"""Which requests share calls of a UNet: the table of pairs decides, and the key follows it."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from sdxl_trt.runtime import Pipeline, Request, share_key
from sdxl_trt.runtime.pairs import FEATURES, PAIRS, SHARED
from sdxl_trt.runtime.pipeline.sharing import FEATURES_IN_KEY

PLAIN = Request("a star", steps=4, width=64, height=64, seed=1, handoff_step=2)
USED: Mapping[str, Callable[[Any], Any]] = {
    "fused LoRA": lambda request: request,
    "8 bits": lambda request: request,
    "LoRA": lambda request: replace(request, loras={"base": ("ink",), "refiner": ("ink",)}),
    "mask": lambda request: replace(request, masking=SimpleNamespace()),
    "nine channels": lambda request: replace(request, takes_mask=True),
    "ControlNet": lambda request: replace(request, controls=(SimpleNamespace(),)),
    "embedding": lambda request: replace(request, embeddings=(SimpleNamespace(),)),
    "tile": lambda request: replace(request, request=replace(request.request, tile=True)),
    "tiny decoder": lambda request: replace(request, request=replace(request.request, vae="tiny")),
    "refine": lambda request: replace(request, first=request.refiner),
    "sweep": lambda request: replace(request, request=replace(request.request, guidance=2.0)),
    "batch": lambda request: replace(request, seeds=(1, 2)),
    "workflow": lambda request: replace(request, request=replace(request.request, graph={})),
    "step cache": lambda request: replace(
        request, request=replace(request.request, cache=2), base=replace(request.base, stop=9)
    ),
}
"""What makes a resolved request one that uses a feature."""


@pytest.fixture
def plain(unloaded: Pipeline) -> Any:
    return unloaded.resolve(PLAIN)


@pytest.mark.parametrize("feature", [name for name in FEATURES if name != SHARED])
def test_the_key_does_what_the_table_says(plain: Any, feature: str) -> None:
    used, sharing = USED[feature](plain), PAIRS[SHARED, feature].sharing
    assert (sharing == "by row") == (feature not in FEATURES_IN_KEY), "what is free by row has no value"
    key = share_key(used, "base")
    assert (key is None) == (sharing == "alone")
    assert (key == share_key(plain, "base")) == (sharing == "by row")
    assert key == share_key(used, "base")


def test_the_refiner_has_no_controlnet(plain: Any) -> None:
    assert share_key(USED["ControlNet"](plain), "refiner") == share_key(plain, "refiner")


@pytest.mark.parametrize(
    "change",
    [{"prompt": "a ring"}, {"negative": "grey"}, {"seed": 2}, {"count": 3}, {"guidance": 2.0}, {"aesthetic_score": 3.0},
     {"guidance_rescale": 0.5}, {"guidance_interval": (0.0, 0.5)}, {"refiner_guidance": 3.0}, {"clip_skip": 1},
     {"prediction_type": "v_prediction"}, {"original_size": (32, 32)}],
    ids=str,
)  # fmt: skip
def test_what_differs_by_row_is_not_in_the_key(unloaded: Pipeline, plain: Any, change: Mapping[str, Any]) -> None:
    other = unloaded.resolve(replace(PLAIN, **change))
    for stage in ("base", "refiner"):
        assert share_key(other, stage) == share_key(plain, stage)


@pytest.mark.parametrize(
    "change",
    [{"steps": 5}, {"sampler": "heun"}, {"compat": "comfyui"}, {"schedule": "trailing"}, {"handoff_step": 3},
     {"width": 128}, {"height": 128}, {"guidance": 1.0}, {"handoff_step": None, "handoff": None}],
    ids=str,
)  # fmt: skip
def test_what_must_be_equal_is_in_the_key(unloaded: Pipeline, plain: Any, change: Mapping[str, Any]) -> None:
    assert share_key(unloaded.resolve(replace(PLAIN, **change)), "base") != share_key(plain, "base")


def test_base_and_refiner_share_no_call(plain: Any) -> None:
    assert share_key(plain, "base") != share_key(plain, "refiner")
