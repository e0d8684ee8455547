"""Calls of Windows that Python's library lacks, through ctypes: memory figures, jobs of processes, folders of DLLs.

Structures have the names, fields and sizes of Microsoft's headers, in types of fixed size. Nothing else in the package
calls Windows by itself. On other systems, whatever needs a library of Windows raises OSError.
"""

__all__ = ["Job", "add_dll_folders", "available_memory", "memory_of", "total_memory"]

import ctypes
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_DWORD, _BOOL, _HANDLE, _SIZE, _LARGE = (
    ctypes.c_uint32,
    ctypes.c_int32,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int64,
)
_QUERY_LIMITED_INFORMATION, _SET_QUOTA, _TERMINATE = 0x1000, 0x0100, 0x0001
_EXTENDED_LIMITS, _KILL_ON_JOB_CLOSE = 9, 0x2000


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX."""

    _fields_ = (
        ("dwLength", _DWORD),
        ("dwMemoryLoad", _DWORD),
        ("ullTotalPhys", ctypes.c_uint64),
        ("ullAvailPhys", ctypes.c_uint64),
        ("ullTotalPageFile", ctypes.c_uint64),
        ("ullAvailPageFile", ctypes.c_uint64),
        ("ullTotalVirtual", ctypes.c_uint64),
        ("ullAvailVirtual", ctypes.c_uint64),
        ("ullAvailExtendedVirtual", ctypes.c_uint64),
    )


class _ProcessMemory(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS_EX."""

    _fields_ = (
        ("cb", _DWORD),
        ("PageFaultCount", _DWORD),
        ("PeakWorkingSetSize", _SIZE),
        ("WorkingSetSize", _SIZE),
        ("QuotaPeakPagedPoolUsage", _SIZE),
        ("QuotaPagedPoolUsage", _SIZE),
        ("QuotaPeakNonPagedPoolUsage", _SIZE),
        ("QuotaNonPagedPoolUsage", _SIZE),
        ("PagefileUsage", _SIZE),
        ("PeakPagefileUsage", _SIZE),
        ("PrivateUsage", _SIZE),
    )


class _BasicLimits(ctypes.Structure):
    """JOBOBJECT_BASIC_LIMIT_INFORMATION."""

    _fields_ = (
        ("PerProcessUserTimeLimit", _LARGE),
        ("PerJobUserTimeLimit", _LARGE),
        ("LimitFlags", _DWORD),
        ("MinimumWorkingSetSize", _SIZE),
        ("MaximumWorkingSetSize", _SIZE),
        ("ActiveProcessLimit", _DWORD),
        ("Affinity", _SIZE),
        ("PriorityClass", _DWORD),
        ("SchedulingClass", _DWORD),
    )


class _Counters(ctypes.Structure):
    """IO_COUNTERS."""

    _fields_ = tuple(
        (f"{kind}{unit}Count", ctypes.c_uint64)
        for unit in ("Operation", "Transfer")
        for kind in ("Read", "Write", "Other")
    )


class _ExtendedLimits(ctypes.Structure):
    """JOBOBJECT_EXTENDED_LIMIT_INFORMATION."""

    _fields_ = (
        ("BasicLimitInformation", _BasicLimits),
        ("IoInfo", _Counters),
        ("ProcessMemoryLimit", _SIZE),
        ("JobMemoryLimit", _SIZE),
        ("PeakProcessMemoryUsed", _SIZE),
        ("PeakJobMemoryUsed", _SIZE),
    )


# Result and arguments of each call. Without them ctypes would cut 64-bit handles to 32 bits.
_CALLS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "AssignProcessToJobObject": (_BOOL, (_HANDLE, _HANDLE)),
    "CloseHandle": (_BOOL, (_HANDLE,)),
    "CreateJobObjectW": (_HANDLE, (ctypes.c_void_p, ctypes.c_wchar_p)),
    "GlobalMemoryStatusEx": (_BOOL, (ctypes.POINTER(_MemoryStatus),)),
    "K32GetProcessMemoryInfo": (_BOOL, (_HANDLE, ctypes.POINTER(_ProcessMemory), _DWORD)),
    "OpenProcess": (_HANDLE, (_DWORD, _BOOL, _DWORD)),
    "SetInformationJobObject": (_BOOL, (_HANDLE, ctypes.c_int32, ctypes.c_void_p, _DWORD)),
    "TerminateJobObject": (_BOOL, (_HANDLE, ctypes.c_uint32)),
}


def _kernel32() -> Any:
    if sys.platform == "win32":
        return ctypes.WinDLL("kernel32", use_last_error=True)
    else:  # noqa: RET505 - the type checker reads the branches of a platform
        raise OSError("kernel32 is a library of Windows")


def _call(name: str, *arguments: Any) -> Any:
    """Call a function of kernel32 and return its result; raise OSError if that is 0, which means failure in all."""
    function = getattr(_kernel32(), name)
    function.restype, function.argtypes = _CALLS[name]
    result = function(*arguments)
    if not result:
        raise _last_error(name)
    return result


def _last_error(name: str) -> OSError:
    if sys.platform == "win32":
        return ctypes.WinError(ctypes.get_last_error())
    else:  # noqa: RET505
        return OSError(f"{name} failed")


def _memory_status() -> _MemoryStatus:
    status = _MemoryStatus(dwLength=ctypes.sizeof(_MemoryStatus))
    _call("GlobalMemoryStatusEx", ctypes.byref(status))
    return status


def available_memory() -> int | None:
    """Return the bytes that this process can allocate without paging, at most what it may commit; None if unknown."""
    try:
        status = _memory_status()
    except OSError:
        return None
    return int(min(status.ullAvailPhys, status.ullAvailPageFile))


def total_memory() -> int:
    """Return the bytes of the machine's memory. Raises OSError if Windows does not tell."""
    return int(_memory_status().ullTotalPhys)


def memory_of(pid: int) -> dict[str, int]:
    """Return a process's memory in bytes under Linux's names for the same things; empty if Windows does not show it.

    "VmRSS" is the working set and "VmHWM" its peak; "RssAnon" is the private commit, in memory or in the page file.
    """
    counters = _ProcessMemory(cb=ctypes.sizeof(_ProcessMemory))
    try:
        process = _call("OpenProcess", _QUERY_LIMITED_INFORMATION, 0, pid)
        try:
            _call("K32GetProcessMemoryInfo", process, ctypes.byref(counters), counters.cb)
        finally:
            _call("CloseHandle", process)
    except OSError:
        return {}
    return {
        "VmRSS": counters.WorkingSetSize,
        "VmHWM": counters.PeakWorkingSetSize,
        "RssAnon": counters.PrivateUsage,
    }


class Job:
    """A job object around a process: all processes of the job end with `end`, and when its last handle closes.

    Windows closes this one when this process ends, however it ends. Raises OSError if the job cannot be made.
    """

    def __init__(self, pid: int) -> None:
        self._handle = _call("CreateJobObjectW", None, None)
        try:
            limits = _ExtendedLimits()
            limits.BasicLimitInformation.LimitFlags = _KILL_ON_JOB_CLOSE
            size = ctypes.sizeof(limits)
            _call("SetInformationJobObject", self._handle, _EXTENDED_LIMITS, ctypes.byref(limits), size)
            process = _call("OpenProcess", _SET_QUOTA | _TERMINATE, 0, pid)
            try:
                _call("AssignProcessToJobObject", self._handle, process)
            finally:
                _call("CloseHandle", process)
        except OSError:
            self.close()
            raise

    def end(self) -> None:
        """End all processes of the job with exit code 1. Raises OSError if Windows refuses."""
        _call("TerminateJobObject", self._handle, 1)

    def close(self) -> None:
        """Close the handle, which ends the job's processes; a second call does nothing."""
        handle, self._handle = self._handle, None
        if handle:
            _call("CloseHandle", handle)


_ADDED: dict[Path, Any] = {}
"""The folders that were added, with the objects that would take them off again."""


def add_dll_folders() -> None:
    """Let this process find the DLLs in NVIDIA's Python packages, where Windows does not look; elsewhere do nothing.

    An extension module's own imports are sought in folders that were added, but libraries that TensorRT opens by name
    are sought on PATH.
    """
    if sys.platform == "win32":
        for folder in _dll_folders():
            if folder not in _ADDED:
                _ADDED[folder] = os.add_dll_directory(str(folder))
                os.environ["PATH"] = os.pathsep.join([str(folder), os.environ.get("PATH", "")])


def _dll_folders() -> list[Path]:
    """Return the folders of DLLs: TensorRT's, those of CUDA 13's packages, those of CUDA 12's."""
    patterns = {"tensorrt_libs": (".",), "nvidia": ("*/bin/x86_64", "*/bin")}
    folders = [
        folder
        for name, below in patterns.items()
        for home in _homes(name)
        for pattern in below
        for folder in ([home] if pattern == "." else sorted(home.glob(pattern)))
    ]
    return [folder for folder in folders if any(folder.glob("*.dll"))]


def _homes(package: str) -> list[Path]:
    """Return the folders of a package without importing it: several for a namespace that packages share."""
    spec = find_spec(package)
    return [Path(place).absolute() for place in (spec and spec.submodule_search_locations) or ()]
