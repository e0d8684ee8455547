"""A run states the components that it uses, in order, so that no plan is read that it does not need."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest

from sdxl_trt.runtime import Pipeline, Request, open_bundle

ENCODERS = ["text_encoder", "text_encoder_2"]
IMAGE = np.zeros((64, 64, 3), np.uint8)


@pytest.fixture(scope="module")
def opened() -> Iterator[Pipeline]:
    with open_bundle() as pipeline:
        yield pipeline


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"handoff": 0.5}, [*ENCODERS, "unet", "refiner_unet", "vae_decoder"]),
        ({"handoff": None}, [*ENCODERS, "unet", "vae_decoder"]),
        (
            {"handoff": 0.5, "cache": 2},
            [*ENCODERS, "unet", "unet_shallow", "refiner_unet", "refiner_unet_shallow", "vae_decoder"],
        ),
        (
            {"handoff": 0.5, "cache": 2, "refiner_cache": 1},
            [*ENCODERS, "unet", "unet_shallow", "refiner_unet", "vae_decoder"],
        ),
        (
            {"handoff": 0.5, "image": IMAGE, "strength": 0.9},
            ["vae_encoder", *ENCODERS, "unet", "refiner_unet", "vae_decoder"],
        ),
        (
            {"handoff": 0.5, "image": IMAGE, "strength": 0.3},
            ["vae_encoder", "text_encoder_2", "refiner_unet", "vae_decoder"],
        ),
    ],
)
def test_the_components_of_a_run_in_order(
    opened: Pipeline, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], expected: list[str]
) -> None:
    stated: list[list[str]] = []

    def expect(names: Iterable[str]) -> None:
        stated.append(list(names))
        raise InterruptedError("before anything is loaded")

    monkeypatch.setattr(opened.pool, "expect", expect)
    request = Request("a star", seed=1, steps=10, width=64, height=64, **changes)
    with pytest.raises(InterruptedError):
        next(opened.steps(request))
    assert stated == [expected]
