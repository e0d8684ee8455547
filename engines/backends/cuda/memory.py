"""Device memory, and pinned host memory for copies."""

__all__ = ["DeviceBuffer", "PinnedBuffer"]

import ctypes
import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from sdxl_trt.engines.backends.cuda.runtime import Cuda, Owned
from sdxl_trt.engines.errors import EngineError


class DeviceBuffer(Owned):
    """`nbytes` of device memory, aligned to at least 256 bytes as cudaMalloc guarantees."""

    destroy = "cudaFree"

    def __init__(self, cuda: Cuda, nbytes: int, doing: str) -> None:
        super().__init__(cuda, int(cuda.call("cudaMalloc", nbytes, doing=doing)))
        self.nbytes = nbytes
        cuda.count(device=nbytes)

    @property
    def address(self) -> int:
        """Where it starts; EngineError after `free`."""
        return int(self.held())

    def free(self) -> bool:
        """See Owned.free."""
        if freed := super().free():
            self.cuda.count(device=-self.nbytes)
        return freed


class PinnedBuffer(Owned):
    """`nbytes` of page-locked host memory, which the device copies from and to directly."""

    destroy = "cudaFreeHost"

    def __init__(self, cuda: Cuda, nbytes: int, doing: str) -> None:
        super().__init__(cuda, int(cuda.call("cudaMallocHost", nbytes, doing=doing)))
        self.nbytes = nbytes
        cuda.count(pinned=nbytes)

    @property
    def address(self) -> int:
        """Where it starts; EngineError after `free`."""
        return int(self.held())

    def view(self, offset: int, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return the bytes from `offset` as an array, which is invalid after `free`."""
        length = math.prod(shape) * np.dtype(dtype).itemsize
        if not 0 <= offset <= offset + length <= self.nbytes:
            raise EngineError(f"bytes {offset} to {offset + length} of a buffer of {self.nbytes}; this is a bug")
        raw = (ctypes.c_char * length).from_address(int(self.held()) + offset)
        array: NDArray[Any] = np.ndarray(shape, dtype, buffer=memoryview(raw))
        return array

    def free(self) -> bool:
        """See Owned.free."""
        if freed := super().free():
            self.cuda.count(pinned=-self.nbytes)
        return freed
