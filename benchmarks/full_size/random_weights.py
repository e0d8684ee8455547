"""Safetensors files of random weights, drawn and written as a stream: only one chunk is in memory at a time."""

__all__ = ["Chunks", "DType", "RandomTensor", "bytes_of", "random_tensors", "split", "write_file"]

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sdxl_trt.engines.host import atomic_write

CHUNK = 1 << 22
LEVELS = 1 << 16
BIAS_DEVIATION = 0.02
DType = Literal["fp16", "fp32"]
Shape = tuple[int, ...]
Chunks = Iterator[npt.NDArray[Any]]
_NUMPY: dict[DType, type[np.floating[Any]]] = {"fp16": np.float16, "fp32": np.float32}
_SAFETENSORS: dict[DType, str] = {"fp16": "F16", "fp32": "F32"}


@dataclass(frozen=True)
class RandomTensor:
    """A tensor generated on demand: `draw` yields its elements in chunks, in row-major order."""

    shape: Shape
    draw: Callable[[], Chunks]


def random_tensors(shapes: Mapping[str, Shape], dtype: DType, seed: str) -> dict[str, RandomTensor]:
    """Return a tensor for each of the model's `shapes`; the same `seed`, name and shape give the same values.

    Matrices and kernels are normal with variance 1 / fan-in, so that activations keep their scale; biases are small;
    normalisations (modules with a one-dimensional weight) have weight 1 and bias 0.
    """
    norms = {name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 1}
    tensors = {}
    for name, shape in shapes.items():
        module, _, parameter = name.rpartition(".")
        draw = partial(_constant, float(parameter == "weight")) if module in norms else partial(_normal, seed, name)
        tensors[name] = RandomTensor(shape, partial(draw, shape, _NUMPY[dtype]))
    return tensors


def bytes_of(shape: Shape, dtype: DType) -> int:
    """Return the bytes of a tensor of `shape`."""
    return math.prod(shape) * np.dtype(_NUMPY[dtype]).itemsize


def header(shapes: Mapping[str, Shape], dtype: DType) -> bytes:
    """Return the header of a safetensors file: the length of the JSON (8 bytes, little-endian) and the JSON.

    Format: https://github.com/huggingface/safetensors#format. Tensors are stored in the order of their names.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in sorted(shapes):
        end = offset + bytes_of(shapes[name], dtype)
        entries[name] = {"dtype": _SAFETENSORS[dtype], "shape": list(shapes[name]), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_file(path: Path, tensors: Mapping[str, RandomTensor], dtype: DType) -> None:
    """Write `tensors` to the safetensors file `path`, atomically."""
    with atomic_write(path) as file:
        file.write(header({name: tensor.shape for name, tensor in tensors.items()}, dtype))
        for name in sorted(tensors):
            for chunk in tensors[name].draw():
                file.write(chunk.data)


def split(tensors: Mapping[str, RandomTensor], dtype: DType, limit: int) -> list[dict[str, RandomTensor]]:
    """Split `tensors`, in the order of their names, into shards of at most `limit` bytes or a single tensor."""
    shards: list[dict[str, RandomTensor]] = [{}]
    size = 0
    for name in sorted(tensors):
        own = bytes_of(tensors[name].shape, dtype)
        if shards[-1] and size + own > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensors[name]
        size += own
    return shards


def _constant(value: float, shape: Shape, dtype: type[np.floating[Any]]) -> Chunks:
    yield np.full(math.prod(shape), value, dtype)


def _normal(seed: str, name: str, shape: Shape, dtype: type[np.floating[Any]]) -> Chunks:
    deviation = BIAS_DEVIATION if len(shape) == 1 else 1 / math.sqrt(math.prod(shape[1:]))
    # Sixteen random bits select one of 65536 quantiles: faster than exact normals, truncated at 4.2 deviations.
    values = (_quantiles() * deviation).astype(dtype)
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    generator = np.random.Generator(np.random.SFC64(int.from_bytes(digest, "little")))
    left = math.prod(shape)
    while left:
        count = min(left, CHUNK)
        yield values[generator.integers(0, LEVELS, count, np.uint16)]
        left -= count


@cache
def _quantiles() -> npt.NDArray[np.float32]:
    normal = NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / LEVELS) for i in range(LEVELS)], np.float32)
