"""One stored tensor before it is read: its location, its shape, its dtype, its scale."""

__all__ = ["Scale", "TensorInfo"]

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sdxl_trt.engines import CorruptError


@dataclass(frozen=True)
class Scale:
    """Location of a weight's scale: one number per block of `block` rows and columns, `grid` blocks in all.

    A convolution's row is an output channel, its columns are all weights of that channel.
    """

    file: Path
    key: str
    grid: tuple[int, int]
    block: tuple[int, int]

    def multiply(self, weight: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Return the stored `weight` × the stored `numbers` of this scale, in fp32, which represents fp8 exactly.

        Raises CorruptError for a scale that is NaN or infinite.
        """
        scale = numbers.to(torch.float32).reshape(self.grid)
        if not bool(torch.isfinite(scale).all()):
            raise CorruptError(f"{self.file}: {self.key} holds NaN or infinite scales; the checkpoint is damaged")
        product = weight.to(torch.float32, copy=True).contiguous()
        matrix, (height, width) = product.view(product.shape[0], -1), self.block
        by_row = scale.repeat_interleave(height, dim=0)[: matrix.shape[0]] if height > 1 else scale
        for column in range(self.grid[1]):  # in place: a scale broadcast to the whole weight would double the memory
            matrix[:, column * width : (column + 1) * width] *= by_row[:, column : column + 1]
        return product


@dataclass(frozen=True)
class TensorInfo:
    """Location of one tensor, its shape, and its safetensors dtype name ("F16", "F32", …).

    `rows` is the range of the stored tensor's rows that make this one, None for all; `transposed` means that the stored
    matrix is this one's transpose. `shape` is the result of both; `position` orders the tensors of a file. A tensor
    with a `scale` is the product of the stored values and the scale, in fp32, and its `dtype` is "F32".
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    rows: tuple[int, int] | None = None
    transposed: bool = False
    position: int = 0
    scale: Scale | None = None

    def part(self, index: int, parts: int) -> "TensorInfo":
        """Return the `index`-th of `parts` equal ranges of rows; a remainder is dropped, so a shape check fails."""
        if not self.shape:
            return self
        size = self.shape[0] // parts
        return replace(self, shape=(size, *self.shape[1:]), rows=(index * size, (index + 1) * size))

    def transpose(self) -> "TensorInfo":
        """Return the transpose of a stored matrix."""
        return replace(self, shape=self.shape[::-1], transposed=not self.transposed)
