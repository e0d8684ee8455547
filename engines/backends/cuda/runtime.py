"""CUDA's runtime for one device: calls that raise our errors, counts of bytes, and handles that are freed once."""

__all__ = ["REMEDY", "Cuda", "Owned", "Usage", "cuda_runtime"]

import importlib
import threading
from dataclasses import dataclass
from typing import Any, ClassVar

from sdxl_trt.engines.backends.cuda.driver import pip_install
from sdxl_trt.engines.errors import EngineError, IncompatibleError, ResourceError, SdxlTrtError

REMEDY = "try --residency swap or stream, a smaller size, or close other programs that use the GPU"
"""What to do when the device's memory is full."""

_OUT_OF_MEMORY = "cudaErrorMemoryAllocation"
_NO_DEVICE = {
    "cudaErrorInsufficientDriver": "install the NVIDIA driver, or update it",
    "cudaErrorNoDevice": "there is no NVIDIA GPU, or CUDA_VISIBLE_DEVICES hides it",
    "cudaErrorSystemDriverMismatch": "reboot, or install one version of the NVIDIA driver",
    "cudaErrorStubLibrary": "install the NVIDIA driver",
}
# After one of these every later call of the process fails: CUDA's documentation of cudaError_t.
_STICKY = {
    "cudaErrorAssert",
    "cudaErrorContained",
    "cudaErrorECCUncorrectable",
    "cudaErrorExternalDevice",
    "cudaErrorHardwareStackError",
    "cudaErrorIllegalAddress",
    "cudaErrorIllegalInstruction",
    "cudaErrorInvalidAddressSpace",
    "cudaErrorInvalidPc",
    "cudaErrorLaunchFailure",
    "cudaErrorLaunchTimeout",
    "cudaErrorMisalignedAddress",
    "cudaErrorMpsClientTerminated",
    "cudaErrorNvlinkUncorrectable",
    "cudaErrorTensorMemoryLeak",
}


def cuda_runtime() -> Any:
    """Import and return ``cuda.bindings.runtime``; raise IncompatibleError if it is missing."""
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except (ImportError, OSError) as exc:
        reason = " ".join(str(exc).split())
        raise IncompatibleError(f"TensorRT needs cuda-bindings ({reason}); {pip_install('tensorrt')}") from exc


@dataclass
class Usage:
    """Bytes currently allocated through one Cuda, and their peaks."""

    device: int = 0
    device_peak: int = 0
    pinned: int = 0
    pinned_peak: int = 0


class Cuda:
    """CUDA's runtime on one device; may be called from any thread."""

    def __init__(self) -> None:
        self.runtime = cuda_runtime()
        self.device = 0
        self.usage = Usage()
        self._lock = threading.Lock()
        self._thread = threading.local()

    def call(self, name: str, *arguments: Any, doing: str, enter: bool = True) -> Any:
        """Call the function `name`; return its value: None, one, or a tuple of several.

        Sets the calling thread's device first; `enter` false is for calls that need none. Raises ResourceError if
        memory runs out, IncompatibleError without driver or device, else EngineError.
        """
        if enter:
            self.enter(doing)
        return self._check(getattr(self.runtime, name)(*arguments), doing)

    def enter(self, doing: str) -> None:
        """Set the calling thread's current device, for libraries' calls too. Raises as `call`."""
        if not getattr(self._thread, "entered", False):
            self._check(self.runtime.cudaSetDevice(self.device), doing)
            self._thread.entered = True

    def quietly(self, name: str, *arguments: Any) -> None:
        """Call the function `name` and ignore its error: for cleanup after an error that has been reported."""
        getattr(self.runtime, name)(*arguments)

    def memory(self) -> tuple[int, int]:
        """Return (free, total) bytes of the device, of all processes."""
        free, total = self.call("cudaMemGetInfo", doing="asking for the free memory")
        return int(free), int(total)

    def explain(self, error: Any, doing: str) -> SdxlTrtError:
        """Return the SdxlTrtError for `error`, a cudaError_t; `doing` describes the failed operation."""
        name = str(getattr(error, "name", error))
        if name == _OUT_OF_MEMORY:
            return ResourceError(f"{doing}: out of memory; {REMEDY}")
        (_, text) = self.runtime.cudaGetErrorString(error)
        text = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
        if name in _NO_DEVICE:
            return IncompatibleError(f"{doing}: {text}; {_NO_DEVICE[name]}")
        if name in _STICKY:
            return EngineError(
                f"{doing}: {name} ({text}); this process can no longer use the GPU: end it, and start again"
            )
        return EngineError(f"{doing}: CUDA failed: {name} ({text})")

    def _check(self, result: tuple[Any, ...], doing: str) -> Any:
        error, *values = result
        if error != self.runtime.cudaError_t.cudaSuccess:
            raise self.explain(error, doing)
        return values[0] if len(values) == 1 else tuple(values) or None

    def count(self, device: int = 0, pinned: int = 0) -> None:
        """Add to `usage`; negative numbers for freed bytes."""
        usage = self.usage
        with self._lock:
            usage.device += device
            usage.pinned += pinned
            usage.device_peak = max(usage.device_peak, usage.device)
            usage.pinned_peak = max(usage.pinned_peak, usage.pinned)


class Owned:
    """A CUDA handle that is freed exactly once, by the first call of `free`."""

    destroy: ClassVar[str]

    def __init__(self, cuda: Cuda, handle: Any) -> None:
        self.cuda = cuda
        self._lock = threading.Lock()
        self._handle = handle

    def free(self) -> bool:
        """Free the handle; return whether this call did. Never raises, since it runs during error handling."""
        with self._lock:
            handle, self._handle = self._handle, None
        if handle is not None:
            self.cuda.quietly(self.destroy, handle)
        return handle is not None

    def held(self) -> Any:
        """Return CUDA's handle; raise EngineError after `free`."""
        if self._handle is None:
            raise EngineError(f"{type(self).__name__} was used after it was freed; load the engine again")
        return self._handle
