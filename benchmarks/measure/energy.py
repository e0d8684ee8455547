"""Energy and memory use of the first GPU from NVML; None without the library or a GPU."""

__all__ = ["Nvml"]

import contextlib
import ctypes
import sys
from typing import Any

_LIBRARY = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"


class _Usage(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class Nvml:
    """The driver's NVML library through ctypes, without a Python package; all results are None if it is missing."""

    def __init__(self, library: Any = None) -> None:
        self._device: ctypes.c_void_p | None = None
        with contextlib.suppress(OSError):
            self._library = ctypes.CDLL(_LIBRARY) if library is None else library
            device = ctypes.c_void_p()
            if not self._library.nvmlInit_v2() and not self._library.nvmlDeviceGetHandleByIndex_v2(
                0, ctypes.byref(device)
            ):
                self._device = device

    def devices(self) -> int | None:
        """Return the number of GPUs in the machine, whatever CUDA_VISIBLE_DEVICES says, or None."""
        count = ctypes.c_uint()
        if self._device is None or self._library.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return None
        return count.value

    def joules(self) -> float | None:
        """Return the energy used since the driver was loaded, or None; GPUs before Volta do not report it."""
        spent = ctypes.c_ulonglong()
        if self._device is None or self._library.nvmlDeviceGetTotalEnergyConsumption(self._device, ctypes.byref(spent)):
            return None
        return spent.value / 1000.0

    def used(self) -> int | None:
        """Return the bytes of GPU memory in use by all processes, or None."""
        usage = _Usage()
        if self._device is None or self._library.nvmlDeviceGetMemoryInfo(self._device, ctypes.byref(usage)):
            return None
        return int(usage.used)
