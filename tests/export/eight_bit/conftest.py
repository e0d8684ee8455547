"""Inputs of the small UNets."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

Inputs = dict[str, NDArray[np.float32]]


@pytest.fixture
def unet_inputs() -> Callable[[int], Inputs]:
    """Return a function from a seed to inputs of the base's UNet of the pair "outline"."""

    def draw(seed: int) -> Inputs:
        rng = np.random.default_rng(seed)
        shapes = {"sample": (2, 4, 16, 16), "encoder_hidden_states": (2, 77, 80), "text_embeds": (2, 48)}
        return {
            **{name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()},
            "timestep": np.full(2, rng.uniform(1, 999), np.float32),
            "time_ids": np.array([[128, 128, 0, 0, 128, 128]] * 2, np.float32),
        }

    return draw
