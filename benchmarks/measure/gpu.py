"""Facts about the machine for a GPU report. Nothing here requires TensorRT or a driver: missing parts are reported."""

__all__ = ["gpu_facts", "no_driver"]

import ctypes
import platform
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version

from sdxl_trt.benchmarks.measure.processes import machine
from sdxl_trt.engines import SdxlTrtError
from sdxl_trt.engines.backends.cuda import Cuda
from sdxl_trt.engines.backends.trt import current_environment, device_available
from sdxl_trt.engines.bundle import Flavour
from sdxl_trt.engines.host import format_bytes

PACKAGES = (
    "sdxl-trt", "tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx", "cuda-bindings", "onnxruntime",
    "onnxruntime-gpu", "onnxruntime-ep-nv-tensorrt-rtx-cu12", "polygraphy", "numpy",
)  # fmt: skip
FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "tensorrt-rtx")
_DRIVER = "libcuda.so.1"


def no_driver() -> str | None:
    """Return why the NVIDIA driver offers no GPU, or None if it offers one. Needs no package."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return f"no NVIDIA driver on this machine ({_DRIVER} is missing)"
    count = ctypes.c_int(0)
    error = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if error:
        return f"the NVIDIA driver does not start (CUDA error {error})"
    return None if count.value else "the NVIDIA driver finds no GPU, or CUDA_VISIBLE_DEVICES hides it"


def gpu_facts() -> dict[str, str]:
    """Return facts by name: system, GPU, versions; a fact that cannot be found is the reason why."""
    host = machine()
    facts = {
        "system": f"{host['system']}, {platform.machine()}, Python {sys.version.split()[0]}",
        "processor": f"{host['processor']}, {host['cores']} cores, {format_bytes(int(host['memory_bytes']))}",
        "GPU": _tried(_gpu),
    }
    facts |= {flavour: _tried(partial(_flavour, flavour)) for flavour in FLAVOURS}
    return facts | {"packages": ", ".join(f"{name} {found}" for name in PACKAGES if (found := _version(name)))}


def _tried(ask: Callable[[], str]) -> str:
    try:
        return ask()
    except SdxlTrtError as exc:
        return str(exc)


def _gpu() -> str:
    reason = device_available()
    if reason:
        return reason
    cuda = Cuda()
    properties = cuda.call("cudaGetDeviceProperties", cuda.device, doing="asking what the GPU is")
    name = properties.name.decode(errors="replace") if isinstance(properties.name, bytes) else properties.name
    free, total = cuda.memory()
    driver = int(cuda.call("cudaDriverGetVersion", doing="asking for the driver's version"))
    return (
        f"{str(name).rstrip(chr(0))}, compute capability {properties.major}.{properties.minor}, {format_bytes(total)},"
        f" {format_bytes(free)} free; the driver supports CUDA {driver // 1000}.{driver % 1000 // 10}"
    )


def _flavour(flavour: Flavour) -> str:
    environment = current_environment(flavour)
    return f"{environment.tensorrt}; driver {environment.driver}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
