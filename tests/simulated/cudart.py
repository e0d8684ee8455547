"""The stand-in for ``cuda.bindings.runtime``: functions that return tuples, with the real module's signatures."""

__all__ = ["NAME", "Cudart", "make_module"]

import functools
import importlib
import inspect
import types
from collections.abc import Callable
from typing import Any

from simulated.binding import LOCK
from simulated.calls import FUNCTIONS, Failure, address
from simulated.calls_device import DeviceCalls
from simulated.calls_memory import MemoryCalls
from simulated.calls_streams import StreamCalls
from simulated.errors import SimulationError

NAME = "cuda.bindings.runtime"
_HARMLESS = ("cudaGetErrorName", "cudaGetErrorString", "cudaGetLastError", "cudaPeekAtLastError")


class Cudart(DeviceCalls, MemoryCalls, StreamCalls):
    """All simulated functions, for one device's memory and streams."""

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Call a simulated function; injected failures come first, and errors are returned as codes."""
        values, function = FUNCTIONS[name], getattr(self, name)
        with LOCK:
            self._device.calls[name] += 1
            self._device.tick()
            if self._device.sticky and name not in _HARMLESS:
                self._free_after_error(name, args, kwargs)
                return self._failed(self._real.cudaError_t.cudaErrorIllegalAddress, values)
            if function.unsafe and self._device.spoils_capture(every=function.synchronizes):
                return self._failed(self._real.cudaError_t.cudaErrorStreamCaptureUnsupported, values)
            try:
                result = function(*args, **kwargs)
            except Failure as failure:
                return self._failed(getattr(self._real.cudaError_t, str(failure)), values)
        if isinstance(result, self._real.cudaError_t):
            return (result,)
        result = result if values > 1 else (result,)[:values]
        return (self._real.cudaError_t.cudaSuccess, *result)

    def _failed(self, error: Any, values: int) -> tuple[Any, ...]:
        self._last = error
        return (error, *[None] * values)

    def _free_after_error(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count the object of a call that frees as freed, although the context is broken: callers can do no more."""
        ends = {"cudaFree": "device", "cudaFreeHost": "pinned", "cudaFreeAsync": "device"}
        handle = next(iter([*args, *kwargs.values()]), None)
        if name in ends and address(handle):
            self._device.memory.free(address(handle), ends[name])
        elif name == "cudaStreamDestroy":
            stream = self.stream(handle)
            stream.alive = False
            stream.queue.clear()
        elif name == "cudaEventDestroy":
            self.event(handle).alive = False
        elif name in ("cudaGraphDestroy", "cudaGraphExecDestroy"):
            self.graph(handle, executable=name == "cudaGraphExecDestroy").alive = False


class _Module(types.ModuleType):
    """Types, constants and enumerations are the real module's; functions are simulated or raise."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)  # AttributeError if the real module has no such name
        if name.startswith("cuda") and inspect.isroutine(value):
            raise SimulationError(f"{NAME}.{name} is not simulated; add it to tests/simulated")
        return value


def make_module(device: Any) -> tuple[types.ModuleType, Cudart]:
    """Return the stand-in module and its functions; raise SimulationError if a signature differs from the real one."""
    real = importlib.import_module(NAME)
    cudart = Cudart(device, real)
    module = _Module(NAME)
    module._real = real  # type: ignore[attr-defined]
    for name in FUNCTIONS:
        signature = inspect.signature(getattr(real, name))
        own = inspect.signature(getattr(cudart, name))
        if list(signature.parameters) != list(own.parameters):
            raise SimulationError(f"{name} takes {own}, the real binding {signature}")
        setattr(module, name, _flat(name, getattr(cudart, name), cudart))
    return module, cudart


def _flat(name: str, function: Callable[..., Any], cudart: Cudart) -> Callable[..., Any]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        bound = signature.bind(*args, **kwargs)  # TypeError for arguments that the real one rejects
        return cudart.call(name, *bound.args)

    return call
