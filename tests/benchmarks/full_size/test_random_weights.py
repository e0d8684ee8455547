"""Random weights are valid safetensors files, reproducible, and never in memory all at once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from sdxl_trt.benchmarks.full_size import random_weights
from sdxl_trt.benchmarks.full_size.random_weights import random_tensors, split, write_file

SHAPES: dict[str, tuple[int, ...]] = {
    "conv.weight": (64, 32, 3, 3), "conv.bias": (64,), "norm.weight": (64,), "norm.bias": (64,),
    "out.weight": (512, 256),
}  # fmt: skip


def _write(path: Path, dtype: Any = "fp32", seed: str = "0") -> dict[str, np.ndarray]:
    write_file(path, random_tensors(SHAPES, dtype, seed), dtype)
    return safetensors.numpy.load_file(path)


@pytest.mark.parametrize(("dtype", "expected"), [("fp16", np.float16), ("fp32", np.float32)])
def test_the_library_reads_names_shapes_and_types(tmp_path: Path, dtype: Any, expected: Any) -> None:
    loaded = _write(tmp_path / "a.safetensors", dtype)
    assert {name: tensor.shape for name, tensor in loaded.items()} == SHAPES
    assert {tensor.dtype for tensor in loaded.values()} == {np.dtype(expected)}
    with safetensors.safe_open(tmp_path / "a.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}, "transformers refuses a file without it"


def test_activations_keep_their_scale(tmp_path: Path) -> None:
    loaded = _write(tmp_path / "a.safetensors")
    for name in ("conv.weight", "out.weight"):
        fan_in = np.prod(SHAPES[name][1:])
        assert loaded[name].std() == pytest.approx(fan_in**-0.5, rel=0.02)
        assert abs(loaded[name].mean()) < 0.02 * fan_in**-0.5
    assert loaded["conv.bias"].std() == pytest.approx(0.02, rel=0.3)
    assert (loaded["norm.weight"] == 1).all()
    assert (loaded["norm.bias"] == 0).all()


def test_values_depend_only_on_seed_and_name(tmp_path: Path) -> None:
    first = _write(tmp_path / "a.safetensors")
    _write(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    other = _write(tmp_path / "c.safetensors", seed="1")
    assert not (first["conv.weight"] == other["conv.weight"]).mean() > 0.01
    twins = {"one": (64, 64), "two": (64, 64)}
    drawn = {name: next(iter(tensor.draw())) for name, tensor in random_tensors(twins, "fp32", "0").items()}
    assert not (drawn["one"] == drawn["two"]).mean() > 0.01


def test_a_tensor_is_drawn_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_weights, "CHUNK", 1000)
    tensor = random_tensors({"w": (70, 50)}, "fp16", "0")["w"]
    assert [len(chunk) for chunk in tensor.draw()] == [1000, 1000, 1000, 500]
    write_file(tmp_path / "a.safetensors", {"w": tensor}, "fp16")
    stored = safetensors.numpy.load_file(tmp_path / "a.safetensors")["w"]
    assert np.array_equal(stored.ravel(), np.concatenate(list(tensor.draw())))


def test_shards_hold_every_tensor_once_within_the_limit() -> None:
    tensors = random_tensors(SHAPES, "fp16", "0")
    limit = 40_000
    shards = split(tensors, "fp16", limit)
    assert sorted(name for shard in shards for name in shard) == sorted(SHAPES)
    assert len(shards) > 1
    for shard in shards:
        assert sum(2 * int(np.prod(tensor.shape)) for tensor in shard.values()) <= limit or len(shard) == 1
