"""What the simulated functions of CUDA's runtime have in common: how they are marked, handles, and failures."""

__all__ = ["FUNCTIONS", "Calls", "Failure", "address", "returns", "size_of"]

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from simulated.errors import SimulationError
from simulated.streams import Event, Graph, Stream

FUNCTIONS: dict[str, int] = {}
"""The simulated functions, and how many values each returns besides the error."""


def returns(values: int, *, unsafe: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """Mark a simulated function; `unsafe` ones spoil a capture that goes on, as CUDA's documentation says."""

    def mark(function: Callable[..., Any]) -> Any:
        FUNCTIONS[function.__name__] = values
        function.unsafe = unsafe  # type: ignore[attr-defined]
        return function

    return mark


class Failure(Exception):  # noqa: N818 - it never leaves this module
    """Ends a call with an error code."""


def address(pointer: Any) -> int:
    """Return what the real binding takes as a pointer: None, a number, or the start of a buffer."""
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
    """Return what the real binding takes as a size_t."""
    size = operator.index(value)
    if size < 0:
        raise OverflowError("can't convert negative value to size_t")
    return size


class Calls:
    """The device, the real module (for its types), and the handles that were given out."""

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
        """Return the living stream of a handle: a number, None, or an object of the real binding."""
        number = 0 if handle is None else int(handle)
        stream = self._device.streams.all.get(number)
        if stream is None or not stream.alive:
            raise SimulationError(f"{number:#x} is no stream, or one that was destroyed")
        return stream

    def event(self, handle: Any) -> Event:
        event = self.events.get(int(handle))
        if event is None or not event.alive:
            raise SimulationError(f"{int(handle):#x} is no event, or one that was destroyed")
        return event

    def graph(self, handle: Any, *, executable: bool) -> Graph:
        graph = self.graphs.get(int(handle))
        if graph is None or not graph.alive or graph.executable != executable:
            raise SimulationError(f"{int(handle):#x} is no {'executable ' if executable else ''}graph, or one that was"
                                  " destroyed")  # fmt: skip
        return graph
