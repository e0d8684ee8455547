"""Where the inputs and outputs of a TensorRT engine lie: device memory in place, pinned memory for copies."""

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
    """The device memory of one engine's tensors; the caller holds the device in every call but `free`.

    A tensor that is bound for a phase and the same one given to a call lie apart, so that neither overwrites the other.
    """

    def __init__(self, device: TrtDevice, name: str) -> None:
        self._device = device
        self._name = name
        self._buffers: dict[tuple[str, str], DeviceBuffer] = {}

    def place(self, use: str, tensor: str, nbytes: int) -> int:
        """Return the address of `tensor`, with `nbytes` at least behind it.

        Memory only grows: while addresses stay, captured graphs stay valid. Raises ResourceError.
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
        """Put copies of `arrays` to their places on the stream, each through its view of pinned memory."""
        for (tensor, array), view in zip(arrays.items(), views, strict=True):
            np.copyto(view, array)
            self._device.stream.upload(places[tensor], view, doing)

    def receive(self, places: Mapping[str, int], targets: Mapping[str, Array], doing: str) -> dict[str, Array]:
        """Copy tensors from their places through views of pinned memory; wait; return arrays of the caller's."""
        for tensor, view in targets.items():
            self._device.stream.download(view, places[tensor], doing)
        self._device.stream.synchronize(doing)
        return {tensor: view.copy() for tensor, view in targets.items()}

    def views(self, layouts: Sequence[Layout]) -> list[Array]:
        """Return arrays of these layouts in the device's pinned memory, side by side, until the device is let go."""
        sizes = [aligned(nbytes_of(layout)) for layout in layouts]
        staging = self._device.staging(sum(sizes))
        offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        return [staging.view(offset, *layout) for offset, layout in zip(offsets, layouts, strict=True)]

    def free(self) -> None:
        """Give all of it back."""
        for buffer in self._buffers.values():
            buffer.free()
        self._buffers = {}


def nbytes_of(layout: Layout) -> int:
    """Return the bytes of an array of `layout`."""
    shape, dtype = layout
    return math.prod(shape) * np.dtype(dtype).itemsize
