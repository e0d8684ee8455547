"""A graph to compute by hand, with its inputs."""

from pathlib import Path

import numpy as np
import pytest
from small_models.graphs import tiny_bundle, tiny_graph

from sdxl_trt.engines.bundle.bundle import Bundle


@pytest.fixture
def weights(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((3, 5)).astype(np.float32)


@pytest.fixture
def bundle(tmp_path: Path, weights: np.ndarray) -> Bundle:
    return tiny_bundle(tmp_path, weights, tiny_graph(weights))


@pytest.fixture
def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"sample": rng.standard_normal((2, 3)).astype(np.float32), "timestep": np.array([1, 2], np.float32)}


@pytest.fixture
def embeds(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return constants with more rows than a call has."""
    return {"text_embeds": rng.standard_normal((4, 5)).astype(np.float32)}
