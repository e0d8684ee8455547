"""The vectors of embeddings among a text encoder's tokens, and the encoder's inputs for them."""

__all__ = ["PLACEHOLDER", "Placed", "Vector", "encoder_inputs"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines import numpy_dtype
from sdxl_trt.engines.bundle import Component
from sdxl_trt.runtime.adapters import Embedding, EncoderName

PLACEHOLDER = 0
"""The token id below a vector: below the end token's id, so that no prompt is pooled at it."""


@dataclass(frozen=True)
class Vector:
    """Row `row` of an embedding's vectors for an encoder. Rows of equal files are equal."""

    embedding: Embedding
    encoder: EncoderName
    row: int

    @property
    def values(self) -> NDArray[np.float32]:
        """Return the vector (width,), which is not to be written to."""
        values: NDArray[np.float32] = self.embedding.found_by(self.encoder)[self.row]
        return values


Placed = tuple[tuple[int, Vector], ...]
"""Vectors with their positions in one row of ids."""


def encoder_inputs(
    component: Component, ids: NDArray[np.int64], placed: Sequence[Placed] = ()
) -> Mapping[str, NDArray[Any]]:
    """Return the inputs of a text encoder for `ids` (rows, tokens), with the vectors `placed` in each row.

    A vector that several rows have is passed once. Encoders of older bundles have no input for vectors; no row may
    have one then.
    """
    if not component.takes_embeddings:
        return {"input_ids": ids}
    numbers: dict[Vector, int] = {}
    index = np.zeros_like(ids)
    for row, vectors in enumerate(placed):
        for position, vector in vectors:
            index[row, position] = numbers.setdefault(vector, len(numbers) + 1)
    spec = component.input("embeddings")
    width, dtype = int(spec.shape[1]), numpy_dtype(spec)
    # A graph without an empty axis: one vector is passed that no position names.
    values = np.stack([vector.values for vector in numbers]) if numbers else np.zeros((1, width), np.float32)
    return {"input_ids": ids, "embedding_index": index, "embeddings": values.astype(dtype)}
