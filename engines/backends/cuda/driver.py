"""The NVIDIA driver, asked through its own library: the CUDA that it supports, its GPUs, and the packages that fit.

Needs no package, so it can answer before gigabytes are installed. Creates no CUDA context, which would take hundreds of
megabytes of device memory.
"""

__all__ = ["Driver", "Gpu", "Problem", "Variant", "ask_driver", "find_driver", "fitting_extras", "pip_install"]

import ctypes
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

Variant = Literal["cu12", "cu13"]
"""The CUDA major version that packages are built for."""

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
NEWEST = (13, 0)
"""The lowest driver that runs packages for CUDA 13: r580."""
OLDEST = (12, 0)
"""The lowest driver that runs packages for CUDA 12: r525."""
_NAME_BYTES = 256
_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""
_NO_DEVICE = 100
_UPDATE = "install the NVIDIA driver r580 or newer"


class Problem(NamedTuple):
    """Why something cannot start, and the one thing to do about it; both are parts of a line, without a full stop."""

    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.reason}; {self.remedy}"


# Values of CUresult.
_START_PROBLEMS = {
    34: Problem(
        f"{LIBRARY} is a stub of the CUDA toolkit, not the NVIDIA driver",
        f"{_UPDATE}, and remove the toolkit's stubs folder from LD_LIBRARY_PATH",
    ),
    802: Problem("the NVIDIA driver is not ready (CUDA error 802)", "start nvidia-fabricmanager, or reboot"),
    803: Problem(
        "the NVIDIA driver's library and its kernel module have different versions (CUDA error 803)",
        "reboot, or reinstall the NVIDIA driver",
    ),
    804: Problem(
        "the package cuda-compat does not support this GPU (CUDA error 804)",
        f"remove cuda-compat from LD_LIBRARY_PATH, or {_UPDATE}",
    ),
}


@dataclass(frozen=True)
class Gpu:
    """One GPU: its name, its compute capability as (major, minor), and its memory in bytes."""

    name: str
    capability: tuple[int, int]
    memory: int


@dataclass(frozen=True)
class Driver:
    """What the driver answered: the CUDA version that it supports as (major, minor), and the visible GPUs in order.

    `cuda` is None without a driver. `problem` is None if packages for CUDA 12 or 13 can run on the first GPU.
    """

    cuda: tuple[int, int] | None = None
    gpus: tuple[Gpu, ...] = ()
    problem: Problem | None = None

    @property
    def variant(self) -> Variant:
        """The newest CUDA whose packages this driver runs; "cu13" without a driver, since a new one is installed."""
        return "cu12" if self.cuda is not None and OLDEST <= self.cuda < NEWEST else "cu13"

    def mismatch(self, package: str, major: int) -> str | None:
        """Return why `package`, built for CUDA `major`, cannot run here; None if it can, or without a driver."""
        if self.cuda is None or self.cuda >= (major, 0):
            return None
        return f"{package} is built for CUDA {major}, and the NVIDIA driver supports only CUDA {_words(self.cuda)}"


@cache
def find_driver() -> Driver:
    """Return this machine's driver; asked once per process."""
    return ask_driver()


def ask_driver(load: Callable[[str], Any] = ctypes.CDLL) -> Driver:
    """Ask the driver's library, which `load` opens by name or raises OSError for; never raises."""
    try:
        library = load(LIBRARY)
    except OSError:
        return Driver(problem=Problem(f"no NVIDIA driver on this machine ({LIBRARY} is missing)", _UPDATE))
    number = ctypes.c_int(0)
    # The only call that works before cuInit, and if cuInit fails; a stub answers 0.
    failed = library.cuDriverGetVersion(ctypes.byref(number))
    cuda = _version(number.value) if number.value and not failed else None
    error = library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(number))
    if error not in (0, _NO_DEVICE):
        unknown = Problem(f"the NVIDIA driver does not start (CUDA error {error})", "check it with nvidia-smi")
        return Driver(cuda, problem=_START_PROBLEMS.get(error, unknown))
    gpus = () if error else tuple(_gpu(library, index) for index in range(number.value))
    return Driver(cuda, gpus, _problem(cuda, gpus))


def _version(number: int) -> tuple[int, int]:
    return number // 1000, number % 1000 // 10


def _words(cuda: tuple[int, int]) -> str:
    return f"{cuda[0]}.{cuda[1]}"


def _problem(cuda: tuple[int, int] | None, gpus: tuple[Gpu, ...]) -> Problem | None:
    if not gpus and os.environ.get("CUDA_VISIBLE_DEVICES", "0") != "0":
        return Problem("CUDA_VISIBLE_DEVICES hides every GPU", "unset it, or set it to 0")
    if not gpus:
        return Problem(
            "the NVIDIA driver finds no GPU", "check it with nvidia-smi; in a container, run it with --gpus all"
        )
    if cuda is not None and cuda < OLDEST:
        return Problem(f"the NVIDIA driver supports only CUDA {_words(cuda)}", _UPDATE)
    return None


def _gpu(library: Any, index: int) -> Gpu:
    device, value = ctypes.c_int(0), ctypes.c_int(0)
    library.cuDeviceGet(ctypes.byref(device), index)
    name = ctypes.create_string_buffer(_NAME_BYTES)
    library.cuDeviceGetName(name, _NAME_BYTES, device)
    capability = []
    for attribute in (_MAJOR, _MINOR):
        library.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(value.value)
    memory = ctypes.c_size_t(0)
    library.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    return Gpu(name.value.decode(errors="replace"), (capability[0], capability[1]), memory.value)


def fitting_extras(*extras: str) -> str:
    """Return `extras`, joined by commas, in the form for the CUDA that this machine's driver supports.

    Each must have a twin for CUDA 12: "gpu", "tensorrt", "tensorrt-rtx".
    """
    suffix = "-cu12" if find_driver().variant == "cu12" else ""
    return ",".join(f"{extra}{suffix}" for extra in extras)


def pip_install(*extras: str) -> str:
    """Return the command that installs `extras`; see fitting_extras."""
    return f"pip install 'sdxl-trt[{fitting_extras(*extras)}]'"
