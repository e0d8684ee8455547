"""The environment of a machine: with the simulated GPU, without one, and with TensorRT for RTX."""

import importlib
import platform
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from sdxl_trt.engines.backends.trt import environment
from sdxl_trt.engines.backends.trt.environment import current_environment, device_available
from sdxl_trt.engines.bundle.plan_record import ANY
from sdxl_trt.engines.errors import IncompatibleError

OPEN = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder@U22)\nGCC version:"
)
CLOSED = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version:  gcc 12"
)
SHORT = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  1000.12  Sat Aug 19 01:15:15 UTC 2029\n"


@pytest.fixture
def driver_file(tmp_path: Path, monkeypatch) -> Path:
    """Return the path that replaces the driver's file in /proc; the file does not exist."""
    file = tmp_path / "version"
    monkeypatch.setattr(environment, "_DRIVER_FILE", file)
    return file


def test_the_environment_has_every_field(simulated, driver_file: Path) -> None:
    driver_file.write_text(OPEN)
    found = current_environment("tensorrt")
    assert found.flavour == "tensorrt"
    assert found.tensorrt == sys.modules["tensorrt"].__version__
    assert (found.gpu, found.compute_capability, found.driver) == ("Simulated GPU", "8.9", "580.65.06")
    assert found.platform == f"{sys.platform}-{platform.machine()}"


@pytest.mark.parametrize(("text", "driver"), [(CLOSED, "535.104.05"), (SHORT, "1000.12"), ("nothing", "CUDA 13.5")])
def test_the_driver_s_version_is_the_kernel_s_or_cuda_s(simulated, driver_file: Path, text: str, driver: str) -> None:
    driver_file.write_text(text)
    assert current_environment("tensorrt").driver == driver


def test_without_the_kernel_s_file_it_is_cuda_s(simulated, driver_file: Path) -> None:
    assert current_environment("tensorrt").driver == "CUDA 13.5"


def test_plans_for_rtx_depend_on_no_gpu(simulated) -> None:
    simulated.install("tensorrt-rtx")
    found = current_environment("tensorrt-rtx")
    assert (found.gpu, found.compute_capability, found.driver) == (ANY, ANY, ANY)
    assert found.tensorrt == sys.modules["tensorrt_rtx"].__version__
    assert not simulated.calls, "CUDA was called"


def test_a_flavour_that_is_not_installed_is_an_error(simulated) -> None:
    with pytest.raises(IncompatibleError, match="provider tensorrt-rtx needs tensorrt_rtx"):
        current_environment("tensorrt-rtx")


def test_a_device_is_found(simulated) -> None:
    assert device_available() is None


class _WithoutDevice(types.ModuleType):
    """CUDA's runtime on a machine where cudaGetDeviceCount returns `error` and `count`."""

    def __init__(self, error: str, count: int | None) -> None:
        super().__init__("cuda.bindings.runtime")
        real = importlib.import_module("cuda.bindings.runtime")
        self.cudaError_t: Any = real.cudaError_t
        self.cudaGetErrorString = real.cudaGetErrorString
        self.cudaGetDeviceCount = lambda: (getattr(real.cudaError_t, error), count)


@pytest.mark.parametrize(
    ("error", "count", "text"),
    [
        ("cudaErrorInsufficientDriver", None, "install the NVIDIA driver, or update it"),
        ("cudaErrorNoDevice", None, "there is no NVIDIA GPU, or CUDA_VISIBLE_DEVICES hides it"),
        ("cudaSuccess", 0, "there is none, or CUDA_VISIBLE_DEVICES hides it"),
    ],
)
def test_a_missing_device_is_explained_in_one_line(error: str, count: int | None, text: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", _WithoutDevice(error, count))
    reason = device_available()
    assert reason is not None
    assert text in reason
    assert "\n" not in reason


def test_missing_bindings_are_explained_too(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    assert "pip install 'sdxl-trt[tensorrt]'" in str(device_available())
