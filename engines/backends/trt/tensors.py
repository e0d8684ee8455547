"""Memory for the inputs and outputs of a TensorRT engine: fixed device buffers, and pinned memory for copies."""

__all__ = ["Layout", "Tensors", "nbytes_of"]

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sdxl_trt.engines.backends.cuda import DeviceBuffer
from sdxl_trt.engines.backends.trt.device import TrtDevice, aligned
from sdxl_trt.engines.engine import Array

Layout = tuple[tuple[int, ...], Any]
"""A shape and a numpy type."""


class Tensors:
    """The device memory of one engine's tensors; the caller holds the device's lock in every call except `free`.

    A tensor bound for a phase and the same tensor as an input of one call have separate buffers.
    """

    def __init__(self, device: TrtDevice, name: str) -> None:
        self._device = device
        self._name = name
        self._buffers: dict[tuple[str, str], DeviceBuffer] = {}

    def place(self, use: str, tensor: str, nbytes: int) -> int:
        """Return the address of a buffer of at least `nbytes` for `tensor`.

        Buffers only grow: as long as addresses do not change, captured graphs stay valid. Raises ResourceError.
        """
        buffer = self._buffers.get((use, tensor))
        if buffer is None or buffer.nbytes < nbytes:
            if buffer is not None:
                del self._buffers[use, tensor]
                buffer.free()
            doing = f"allocating memory for {tensor} of {self._name}"
            buffer = self._buffers[use, tensor] = DeviceBuffer(self._device.cuda, aligned(nbytes), doing)
        return buffer.address

    def send(self, places: Mapping[str, int], arrays: Mapping[str, Array], views: Sequence[Array], doing: str) -> None:
        """Enqueue copies of `arrays` to their addresses, each through its view of pinned memory."""
        for (tensor, array), view in zip(arrays.items(), views, strict=True):
            np.copyto(view, array)
            self._device.stream.upload(places[tensor], view, doing)

    def receive(self, places: Mapping[str, int], targets: Mapping[str, Array], doing: str) -> dict[str, Array]:
        """Copy tensors from their addresses through views of pinned memory; wait; the caller owns the arrays."""
        for tensor, view in targets.items():
            self._device.stream.download(view, places[tensor], doing)
        self._device.stream.synchronize(doing)
        return {tensor: view.copy() for tensor, view in targets.items()}

    def views(self, layouts: Sequence[Layout]) -> list[Array]:
        """Return arrays of these layouts, side by side in the device's pinned memory, valid while the lock is held."""
        sizes = [aligned(nbytes_of(layout)) for layout in layouts]
        staging = self._device.staging(sum(sizes))
        offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        return [staging.view(offset, *layout) for offset, layout in zip(offsets, layouts, strict=True)]

    def free(self) -> None:
        """Free all buffers."""
        for buffer in self._buffers.values():
            buffer.free()
        self._buffers = {}


def nbytes_of(layout: Layout) -> int:
    """Return the bytes of an array of `layout`."""
    shape, dtype = layout
    return math.prod(shape) * np.dtype(dtype).itemsize
