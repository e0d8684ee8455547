"""Merging within bounds: a file's ranks do not multiply the memory that it takes."""

import tracemalloc
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from sdxl_trt.engines.adapters.kinds import Branch, LoraKind
from sdxl_trt.engines.adapters.merge import merge
from sdxl_trt.engines.adapters.names import Place
from sdxl_trt.engines.adapters.tensors import StoredTensor

OUT, IN, KERNEL = 6, 40, (3, 3)
CORES = {"LoRA": "mid", "LoKr": "lokr_t2"}


def _branch(kind: LoraKind, shapes: dict[str, tuple[int, ...]]) -> Branch:
    assert kind in get_args(LoraKind)
    parts = {part: StoredTensor(Path("x"), part, shape, "F32") for part, shape in shapes.items()}
    return Branch(Place("unet", "conv_out", ""), kind, parts)


@pytest.mark.parametrize("kind", ["LoRA", "LoKr"])
@pytest.mark.parametrize("ranks", [(4000, 1), (1, 4000)])
def test_a_core_of_any_ranks_takes_little_memory_beside_file_and_weight(kind: LoraKind, ranks: tuple[int, int]) -> None:
    draw, (rows, columns) = np.random.default_rng(0), ranks
    up, core, down = (draw.standard_normal(shape, np.float32)
                      for shape in ((OUT, rows), (rows, columns, *KERNEL), (columns, IN)))  # fmt: skip
    tensors = {"up": up, "mid": core, "down": down}
    if kind == "LoKr":
        tensors = {"lokr_w1": np.ones((1, 1), np.float32), "lokr_w2_a": up.T.copy(), "lokr_t2": core, "lokr_w2_b": down}
    branch = _branch(kind, {part: tensor.shape for part, tensor in tensors.items()})
    weight = np.zeros((OUT, IN, *KERNEL), np.float32)
    tracemalloc.start()
    merge(weight, branch, tensors, 1.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    file = sum(tensor.nbytes for tensor in tensors.values())
    assert peak < 2 * file + 4 * weight.nbytes
    expected = np.tensordot(np.tensordot(up.astype(float), core, (1, 0)), down, (1, 0)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(weight, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
