"""What is known of one stored tensor before it is read: where it lies, its shape, its dtype, what scales it."""

__all__ = ["Scale", "TensorInfo"]

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sdxl_trt.engines import CorruptError


@dataclass(frozen=True)
class Scale:
    """Where the scale of a weight lies: one number for each block of `block` rows and columns, `grid` blocks in all.

    The columns of a convolution are all that belongs to one output channel.
    """

    file: Path
    key: str
    grid: tuple[int, int]
    block: tuple[int, int]

    def multiply(self, weight: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Return the stored `weight` × the stored `numbers` of this scale, in fp32, which holds every fp8 number.

        Raises CorruptError for a scale that is NaN or infinite.
        """
        scale = numbers.to(torch.float32).reshape(self.grid)
        if not bool(torch.isfinite(scale).all()):
            raise CorruptError(f"{self.file}: {self.key} holds NaN or infinite scales; the checkpoint is damaged")
        product = weight.to(torch.float32, copy=True).contiguous()
        matrix, (height, width) = product.view(product.shape[0], -1), self.block
        by_row = scale.repeat_interleave(height, dim=0)[: matrix.shape[0]] if height > 1 else scale
        for column in range(self.grid[1]):  # in place: a scale spread over the whole weight would be as large again
            matrix[:, column * width : (column + 1) * width] *= by_row[:, column : column + 1]
        return product


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies, its shape, and its safetensors dtype name ("F16", "F32", …).

    `rows` are those of the stored tensor that make this one, all where None; `transposed` says that the stored
    matrix is this one's transpose. `shape` is what they leave; `position` orders the tensors of a file. A tensor with
    a `scale` is the product of what is stored and the scale, in fp32, and its `dtype` is "F32".
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
        """Return the `index`-th of `parts` equal ranges of rows; a remainder is left out, for shapes to disagree."""
        if not self.shape:
            return self
        size = self.shape[0] // parts
        return replace(self, shape=(size, *self.shape[1:]), rows=(index * size, (index + 1) * size))

    def transpose(self) -> "TensorInfo":
        """Return the transpose of a stored matrix."""
        return replace(self, shape=self.shape[::-1], transposed=not self.transposed)
