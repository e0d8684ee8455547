"""What NVML knows of the first GPU: energy spent and memory in use. Without the library or a GPU it knows nothing."""

__all__ = ["Nvml"]

import contextlib
import ctypes
from typing import Any

_LIBRARY = "libnvidia-ml.so.1"


class _Usage(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class Nvml:
    """The driver's own library through ctypes, which needs no package; every answer is None where it is not there."""

    def __init__(self, library: Any = None) -> None:
        self._device: ctypes.c_void_p | None = None
        with contextlib.suppress(OSError):
            self._library = ctypes.CDLL(_LIBRARY) if library is None else library
            device = ctypes.c_void_p()
            if not self._library.nvmlInit_v2() and not self._library.nvmlDeviceGetHandleByIndex_v2(
                0, ctypes.byref(device)
            ):
                self._device = device

    def joules(self) -> float | None:
        """Return what the GPU has spent since the driver was loaded; GPUs before Volta do not count it."""
        spent = ctypes.c_ulonglong()
        if self._device is None or self._library.nvmlDeviceGetTotalEnergyConsumption(self._device, ctypes.byref(spent)):
            return None
        return spent.value / 1000.0

    def used(self) -> int | None:
        """Return the bytes of the GPU's memory that are in use, by whomever."""
        usage = _Usage()
        if self._device is None or self._library.nvmlDeviceGetMemoryInfo(self._device, ctypes.byref(usage)):
            return None
        return int(usage.used)
