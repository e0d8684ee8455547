"""The NVIDIA driver, asked through a stand-in for its library that fills what the real one fills."""

import ctypes
from collections.abc import Callable
from typing import Any

import pytest

from sdxl_trt.engines.backends.cuda import driver as driver_module
from sdxl_trt.engines.backends.cuda.driver import Driver, Gpu, ask_driver, fitting_extras, pip_install

FOUND = (Gpu("NVIDIA GeForce RTX 4090", (8, 9), 25_282_281_472),)


class Library:
    """libcuda for `gpus`; `error` is what cuInit returns. The names are CUDA's."""

    def __init__(self, version: int = 13000, gpus: tuple[Gpu, ...] = FOUND, error: int = 0) -> None:
        self.version, self.gpus, self.error, self.started = version, gpus, error, False

    def cuDriverGetVersion(self, target: Any) -> int:  # noqa: N802
        target._obj.value = self.version
        return 0

    def cuInit(self, flags: int) -> int:  # noqa: N802
        self.started = not self.error
        return self.error

    def cuDeviceGetCount(self, target: Any) -> int:  # noqa: N802
        assert self.started
        target._obj.value = len(self.gpus)
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:  # noqa: N802
        device._obj.value = 40 + ordinal  # a handle is not an ordinal
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:  # noqa: N802
        name.value = self.gpus[device.value - 40].name.encode()[: size - 1]
        return 0

    def cuDeviceGetAttribute(self, target: Any, attribute: int, device: Any) -> int:  # noqa: N802
        target._obj.value = dict(zip((75, 76), self.gpus[device.value - 40].capability, strict=True))[attribute]
        return 0

    def cuDeviceTotalMem_v2(self, target: Any, device: Any) -> int:  # noqa: N802
        target._obj.value = self.gpus[device.value - 40].memory
        return 0


def _ask(library: Library) -> Driver:
    return ask_driver(lambda name: library)


def test_the_gpus_are_described() -> None:
    two = (*FOUND, Gpu("NVIDIA T4", (7, 5), 15 << 30))
    driver = _ask(Library(12080, two))
    assert (driver.cuda, driver.gpus, driver.problem) == ((12, 8), two, None)


@pytest.mark.parametrize(
    ("version", "variant", "suffix"),
    [
        (13010, "cu13", ""), (13000, "cu13", ""), (12090, "cu12", "-cu12"), (12020, "cu12", "-cu12"),
        (12000, "cu12", "-cu12"),
    ],
)  # fmt: skip
def test_the_driver_chooses_the_packages(
    use_driver: Callable[[Driver], None], version: int, variant: str, suffix: str
) -> None:
    driver = _ask(Library(version))
    assert (driver.variant, driver.problem) == (variant, None)
    assert (driver.mismatch("it", 13) is None) == (variant == "cu13")
    assert driver.mismatch("it", 12) is None
    use_driver(driver)
    assert fitting_extras("gpu", "tensorrt") == f"gpu{suffix},tensorrt{suffix}"
    assert pip_install("tensorrt-rtx") == f"pip install 'sdxl-trt[tensorrt-rtx{suffix}]'"


@pytest.mark.parametrize(
    ("library", "cuda", "reason", "remedy"),
    [
        (Library(11080), (11, 8), "supports only CUDA 11.8", "install the NVIDIA driver r580 or newer"),
        (Library(gpus=()), (13, 0), "finds no GPU", "--gpus all"),
        (Library(error=100), (13, 0), "finds no GPU", "nvidia-smi"),
        (Library(error=803), (13, 0), "different versions", "reboot"),
        (Library(error=804), (13, 0), "cuda-compat does not support", "remove cuda-compat"),
        (Library(0, error=34), None, "is a stub", "stubs folder"),
        (Library(error=999), (13, 0), "does not start (CUDA error 999)", "nvidia-smi"),
    ],
)
def test_what_is_wrong_has_a_remedy(
    library: Library, cuda: tuple[int, int] | None, reason: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    driver = _ask(library)
    assert driver.cuda == cuda
    assert driver.problem is not None
    assert reason in driver.problem.reason
    assert remedy in driver.problem.remedy
    assert "\n" not in str(driver.problem)


def test_hidden_gpus_are_not_missing_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    problem = _ask(Library(error=100)).problem
    assert problem is not None
    assert str(problem) == "CUDA_VISIBLE_DEVICES hides every GPU; unset it, or set it to 0"


def test_a_machine_without_a_driver() -> None:
    def absent(name: str) -> None:
        raise OSError(name)

    driver = ask_driver(absent)
    assert str(driver.problem) == (
        "no NVIDIA driver on this machine (libcuda.so.1 is missing); install the NVIDIA driver r580 or newer"
    )
    assert driver.variant == "cu13"
    assert driver.mismatch("it", 13) is None


def test_the_numbers_and_names_are_cuda_s() -> None:
    """Compared with NVIDIA's own binding of the driver's library, which imports without a driver."""
    real = pytest.importorskip("cuda.bindings.driver")
    attributes = real.CUdevice_attribute
    assert attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR == driver_module._MAJOR
    assert attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR == driver_module._MINOR
    assert driver_module._NO_DEVICE == real.CUresult.CUDA_ERROR_NO_DEVICE
    named = {34: "STUB_LIBRARY", 802: "SYSTEM_NOT_READY", 803: "SYSTEM_DRIVER_MISMATCH",
             804: "COMPAT_NOT_SUPPORTED_ON_DEVICE"}  # fmt: skip
    names = {code: real.CUresult(code).name for code in driver_module._START_PROBLEMS}
    assert {code: name.removeprefix("CUDA_ERROR_") for code, name in names.items()} == named
    for name in vars(Library):
        assert not name.startswith("cu") or hasattr(real, name.removesuffix("_v2")), name


def test_the_calls_have_the_library_s_types(tmp_path: Any) -> None:
    """A compiled library with the declarations of cuda.h fills the same values through ctypes."""
    import shutil
    import subprocess

    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, library = tmp_path / "cuda.c", tmp_path / "libcuda.so.1"
    source.write_text("""
#include <stddef.h>
#include <string.h>
int cuDriverGetVersion(int *v) { *v = 12040; return 0; }
int cuInit(unsigned flags) { return flags; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 7 + ordinal; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, device == 7 ? "L4" : "?", size); return 0; }
int cuDeviceGetAttribute(int *v, int which, int device) { *v = which == 75 ? 8 : which == 76 ? 9 : 0; return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = 24ull << 30; return 0; }
""")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    driver = ask_driver(lambda name: ctypes.CDLL(str(tmp_path / name)))
    assert driver == Driver((12, 4), (Gpu("L4", (8, 9), 24 << 30),))
