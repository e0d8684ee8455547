"""Facts about the machine for a GPU report. Nothing here requires TensorRT or a driver: missing parts are reported."""

__all__ = ["gpu_extras", "gpu_facts", "no_driver"]

import platform
import sys
from collections.abc import Callable
from functools import partial

from sdxl_trt.benchmarks.measure.processes import machine
from sdxl_trt.engines import SdxlTrtError
from sdxl_trt.engines.backends.cuda import Cuda, find_driver, fitting_extras
from sdxl_trt.engines.backends.trt import current_environment, device_available
from sdxl_trt.engines.bundle import Flavour
from sdxl_trt.engines.host import format_bytes
from sdxl_trt.engines.inspection import relevant_packages

FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "tensorrt-rtx")


def no_driver() -> str | None:
    """Return why the NVIDIA driver offers no usable GPU and what to do, or None if it offers one. Needs no package."""
    problem = find_driver().problem
    return None if problem is None else str(problem)


def gpu_extras() -> str:
    """Return the extras of this project that the driver can run, joined by commas, with what the GPU check needs."""
    return f"{fitting_extras('gpu', 'tensorrt')},verify"


def gpu_facts() -> dict[str, str]:
    """Return facts by name: system, GPU, versions; a fact that cannot be found is the reason why."""
    host = machine()
    facts = {
        "system": f"{host['system']}, {platform.machine()}, Python {sys.version.split()[0]}",
        "processor": f"{host['processor']}, {host['cores']} cores, {format_bytes(int(host['memory_bytes']))}",
        "GPU": _tried(_gpu),
    }
    facts |= {flavour: _tried(partial(_flavour, flavour)) for flavour in FLAVOURS}
    return facts | {"packages": ", ".join(f"{name} {version}" for name, version in relevant_packages().items())}


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
