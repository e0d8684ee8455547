"""Calls of Windows on a stand-in for kernel32: their arguments, what is closed, and what a failure becomes."""

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdxl_trt.engines.host import add_dll_folders, available_host_memory, process_memory, windows

JOB, PROCESS = 0x1_0000_0010, 0x1_0000_0020
"""Handles wider than an int, which ctypes would cut without argument types."""


class _Kernel32:
    """Answers calls by name and keeps them; arguments must suit the argument types, which each call must have set."""

    def __init__(self, **answers: Callable[..., Any]) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self._answers = answers

    def __getattr__(self, name: str) -> Any:
        def function(*arguments: Any) -> Any:
            assert len(arguments) == len(function.argtypes)
            for kind, value in zip(function.argtypes, arguments, strict=True):
                kind.from_param(value)
            self.calls.append((name, arguments))
            return self._answers.get(name, lambda *_: 1)(*arguments)

        function.argtypes, function.restype = (), None
        return function

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


@pytest.fixture
def kernel32(monkeypatch: pytest.MonkeyPatch) -> Callable[..., _Kernel32]:
    """Return a function that puts a stand-in with these answers in place, on what claims to be Windows."""

    def install(**answers: Callable[..., Any]) -> _Kernel32:
        stand_in = _Kernel32(**answers)
        monkeypatch.setattr(sys, "platform", "win32")
        monkeypatch.setattr(windows, "_kernel32", lambda: stand_in)
        monkeypatch.setattr(windows, "_last_error", lambda name: OSError(f"{name} failed"))
        return stand_in

    return install


# Sizes on 64-bit Windows, and offsets of what is read or written, by the declarations in Microsoft's documentation.
LAYOUT = [
    (windows._MemoryStatus, 64, {"dwLength": 0, "ullTotalPhys": 8, "ullAvailPhys": 16, "ullAvailPageFile": 32}),
    (windows._ProcessMemory, 80, {"cb": 0, "PeakWorkingSetSize": 8, "WorkingSetSize": 16, "PrivateUsage": 72}),
    (windows._BasicLimits, 64, {"LimitFlags": 16, "ActiveProcessLimit": 40, "SchedulingClass": 60}),
    (windows._Counters, 48, {"ReadOperationCount": 0, "OtherOperationCount": 16, "ReadTransferCount": 24}),
    (windows._ExtendedLimits, 144, {"BasicLimitInformation": 0, "IoInfo": 64, "PeakJobMemoryUsed": 136}),
]


@pytest.mark.parametrize(("structure", "size", "offsets"), LAYOUT, ids=[each[0].__doc__ for each in LAYOUT])
def test_structures_are_laid_out_as_documented(structure: Any, size: int, offsets: dict[str, int]) -> None:
    assert ctypes.sizeof(structure) == size
    assert {name: getattr(structure, name).offset for name in offsets} == offsets


def _status(physical: int, page_file: int) -> Callable[..., int]:
    def fill(pointer: Any) -> int:
        status = pointer._obj
        assert status.dwLength == 64
        status.ullTotalPhys, status.ullAvailPhys, status.ullAvailPageFile = 9, physical, page_file
        return 1

    return fill


@pytest.mark.parametrize(("physical", "page_file"), [(5, 7), (7, 5)])
def test_available_memory_is_what_is_free_and_may_be_committed(
    kernel32: Callable[..., _Kernel32], physical: int, page_file: int
) -> None:
    kernel32(GlobalMemoryStatusEx=_status(physical, page_file))
    assert available_host_memory() == 5
    assert windows.total_memory() == 9


def test_memory_that_windows_does_not_tell_is_unknown(kernel32: Callable[..., _Kernel32]) -> None:
    kernel32(GlobalMemoryStatusEx=lambda _: 0)
    assert available_host_memory() is None
    with pytest.raises(OSError, match="GlobalMemoryStatusEx"):
        windows.total_memory()


def test_a_process_is_asked_for_its_memory_and_closed(kernel32: Callable[..., _Kernel32]) -> None:
    def fill(process: int, pointer: Any, size: int) -> int:
        assert (process, size, pointer._obj.cb) == (PROCESS, 80, 80)
        pointer._obj.WorkingSetSize, pointer._obj.PeakWorkingSetSize, pointer._obj.PrivateUsage = 1, 2, 3
        return 1

    stand_in = kernel32(OpenProcess=lambda *_: PROCESS, K32GetProcessMemoryInfo=fill)
    assert process_memory(77) == {"VmRSS": 1, "VmHWM": 2, "RssAnon": 3}
    assert stand_in.calls[0] == ("OpenProcess", (0x1000, 0, 77))
    assert stand_in.calls[-1] == ("CloseHandle", (PROCESS,))
    process_memory()
    assert stand_in.calls[3] == ("OpenProcess", (0x1000, 0, os.getpid()))


@pytest.mark.parametrize("failing", ["OpenProcess", "K32GetProcessMemoryInfo"])
def test_a_process_that_has_ended_has_no_memory(kernel32: Callable[..., _Kernel32], failing: str) -> None:
    stand_in = kernel32(**{"OpenProcess": lambda *_: PROCESS, failing: lambda *_: 0})
    assert process_memory(77) == {}
    assert stand_in.names().count("CloseHandle") == (failing != "OpenProcess")


def _handles() -> dict[str, Callable[..., int]]:
    return {"CreateJobObjectW": lambda *_: JOB, "OpenProcess": lambda *_: PROCESS}


def test_a_job_kills_its_processes_when_its_last_handle_closes(kernel32: Callable[..., _Kernel32]) -> None:
    flags: list[int] = []

    def limit(job: int, kind: int, pointer: Any, size: int) -> int:
        assert (job, kind, size) == (JOB, 9, 144)
        flags.append(pointer._obj.BasicLimitInformation.LimitFlags)
        return 1

    stand_in = kernel32(**_handles(), SetInformationJobObject=limit)
    job = windows.Job(77)
    assert flags == [0x2000]
    assert ("OpenProcess", (0x0101, 0, 77)) in stand_in.calls
    assert ("AssignProcessToJobObject", (JOB, PROCESS)) in stand_in.calls
    assert stand_in.calls[-1] == ("CloseHandle", (PROCESS,))
    job.end()
    assert stand_in.calls[-1] == ("TerminateJobObject", (JOB, 1))
    job.close()
    job.close()
    assert stand_in.calls[-1] == ("CloseHandle", (JOB,))
    assert stand_in.names().count("CloseHandle") == 2


@pytest.mark.parametrize("failing", ["SetInformationJobObject", "OpenProcess", "AssignProcessToJobObject"])
def test_a_job_that_cannot_be_made_is_closed(kernel32: Callable[..., _Kernel32], failing: str) -> None:
    stand_in = kernel32(**{**_handles(), failing: lambda *_: 0})
    with pytest.raises(OSError, match=failing):
        windows.Job(77)
    assert stand_in.calls[-1] == ("CloseHandle", (JOB,))


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of packages, laid out as in the wheels for Windows, on the module path."""
    for name in (
        "tensorrt_libs/__init__.py", "tensorrt_libs/nvinfer_11.dll", "nvidia/cu13/bin/x86_64/cudart64_13.dll",
        "nvidia/cublas/bin/cublas64_12.dll", "nvidia/cu13/include/cuda.h", "nvidia/empty/bin/readme.txt",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(windows, "_ADDED", {})
    monkeypatch.setenv("PATH", "before")
    return tmp_path


def test_folders_of_dlls_are_added_once(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[str] = []
    monkeypatch.setattr(os, "add_dll_directory", lambda folder: added.append(folder) or object(), raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    add_dll_folders()
    add_dll_folders()
    expected = [str(wheels / name) for name in ("tensorrt_libs", "nvidia/cu13/bin/x86_64", "nvidia/cublas/bin")]
    assert added == expected
    assert os.environ["PATH"].split(os.pathsep) == [*reversed(expected), "before"]
    assert len(windows._ADDED) == 3
    assert "tensorrt_libs" not in sys.modules


def test_other_systems_find_libraries_by_themselves(wheels: Path) -> None:
    add_dll_folders()
    assert windows._ADDED == {}
    assert os.environ["PATH"] == "before"
