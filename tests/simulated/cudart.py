"""The stand-in for ``cuda.bindings.runtime``: flat functions that return tuples, with the real module's signatures."""

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
    """All simulated functions, over one device's memory and streams."""

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Call a simulated function as the module does: failures on demand first, errors as codes."""
        values, function = FUNCTIONS[name], getattr(self, name)
        with LOCK:
            self._device.calls[name] += 1
            self._device.tick()
            if self._device.sticky and name not in _HARMLESS:
                self._forget(name, args, kwargs)
                return self._failed(self._real.cudaError_t.cudaErrorIllegalAddress, values)
            if function.unsafe and self._device.spoils_capture():
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

    def _forget(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count what a broken context was asked to free as freed: more nobody can do."""
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
    """Types, constants and enumerations are the real module's; functions are simulated or refused."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)  # AttributeError where the real one has no such name
        if name.startswith("cuda") and inspect.isroutine(value):
            raise SimulationError(f"{NAME}.{name} is not simulated; add it to tests/simulated")
        return value


def make_module(device: Any) -> tuple[types.ModuleType, Cudart]:
    """Return the stand-in module and the functions behind it; SimulationError where a signature is not the real one."""
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
        bound = signature.bind(*args, **kwargs)  # TypeError for what the real one refuses
        return cudart.call(name, *bound.args)

    return call
