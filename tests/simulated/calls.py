"""Shared code of CUDA's simulated runtime functions: their decorator, handles, and failures."""

__all__ = ["FUNCTIONS", "Calls", "Failure", "address", "returns", "size_of"]

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from simulated.errors import SimulationError
from simulated.streams import Event, Graph, Stream

FUNCTIONS: dict[str, int] = {}
"""The simulated functions, and how many values each returns in addition to the error."""


def returns(values: int, *, unsafe: bool = False, synchronizes: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """Register a simulated function; `unsafe` ones invalidate a running capture, as CUDA's documentation states.

    One that `synchronizes` the device invalidates the captures of all threads, whatever their mode, and fails: so
    https://github.com/NVIDIA/TensorRT/issues/2888 reports.
    """

    def mark(function: Callable[..., Any]) -> Any:
        FUNCTIONS[function.__name__] = values
        function.unsafe = unsafe or synchronizes  # type: ignore[attr-defined]
        function.synchronizes = synchronizes  # type: ignore[attr-defined]
        return function

    return mark


class Failure(Exception):  # noqa: N818 - it never leaves this module
    """Ends a call with an error code."""


def address(pointer: Any) -> int:
    """Return the address of a pointer that the real binding accepts: None, a number, or a buffer."""
    if pointer is None:
        return 0
    try:
        return int(pointer)
    except (TypeError, ValueError):
        pass
    try:
        return np.frombuffer(memoryview(pointer), np.uint8).ctypes.data
    except TypeError:
        raise TypeError(
            f"Provided argument is of type {type(pointer)} but expected Type None, int or object with Buffer Protocol"
        ) from None


def size_of(value: Any) -> int:
    """Return `value` as a size_t, or raise as the real binding does."""
    size = operator.index(value)
    if size < 0:
        raise OverflowError("can't convert negative value to size_t")
    return size


class Calls:
    """Base of the simulated functions: the device, the real module (for its types), and all handles."""

    def __init__(self, device: Any, real: Any) -> None:
        self._device = device
        self._real = real
        self._handles = iter(range(0x1000, 1 << 40, 0x10))
        self.events: dict[int, Event] = {}
        self.graphs: dict[int, Graph] = {}

    def require(self, condition: bool, error: str) -> None:
        if not condition:
            raise Failure(error)

    def stream(self, handle: Any) -> Stream:
        """Return the stream of a handle: a number, None, or an object of the real binding."""
        number = 0 if handle is None else int(handle)
        stream = self._device.streams.all.get(number)
        if stream is None or not stream.alive:
            raise SimulationError(f"{number:#x} is not a stream, or it was destroyed")
        return stream

    def event(self, handle: Any) -> Event:
        event = self.events.get(int(handle))
        if event is None or not event.alive:
            raise SimulationError(f"{int(handle):#x} is not an event, or it was destroyed")
        return event

    def graph(self, handle: Any, *, executable: bool) -> Graph:
        graph = self.graphs.get(int(handle))
        if graph is None or not graph.alive or graph.executable != executable:
            raise SimulationError(f"{int(handle):#x} is not {'an executable' if executable else 'a'} graph, or it was"
                                  " destroyed")  # fmt: skip
        return graph
