"""This machine as recorded in a plan's key: TensorRT, GPU, driver, platform."""

__all__ = ["current_environment", "device_available", "gpu_of"]

import platform
import re
import sys
from pathlib import Path

from sdxl_trt.engines.backends.cuda import Cuda
from sdxl_trt.engines.backends.trt.api import library_version, tensorrt_module
from sdxl_trt.engines.bundle import ANY, Environment, Flavour
from sdxl_trt.engines.errors import SdxlTrtError

_DRIVER_FILE = Path("/proc/driver/nvidia/version")
# "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (…)"
_DRIVER = re.compile(r"\b\d{3,4}\.\d+(?:\.\d+)?\b")


def current_environment(flavour: Flavour) -> Environment:
    """Return the environment of this machine, which plans must match; the GPU is the first visible one.

    TensorRT for RTX builds ahead of time for every GPU: it needs none here, and the GPU fields are "any". Raises
    IncompatibleError if TensorRT, cuda-bindings, the driver or, for `tensorrt`, the GPU is missing.
    """
    version = library_version(tensorrt_module(flavour))
    gpu, capability, driver = ANY, ANY, ANY
    if flavour == "tensorrt":
        cuda = Cuda()
        (gpu, capability), driver = gpu_of(cuda), _driver(cuda)
    return Environment(
        flavour=flavour,
        tensorrt=version,
        gpu=gpu,
        compute_capability=capability,
        driver=driver,
        platform=f"{sys.platform}-{platform.machine()}",
    )


def device_available() -> str | None:
    """Return why no NVIDIA GPU can be used, in one line, or None if one can."""
    doing = "looking for an NVIDIA GPU"
    try:
        count = Cuda().call("cudaGetDeviceCount", doing=doing, enter=False)
    except SdxlTrtError as exc:
        return str(exc)
    return None if count else f"{doing}: there is none, or CUDA_VISIBLE_DEVICES hides it"


def gpu_of(cuda: Cuda) -> tuple[str, str]:
    """Return the GPU's name and its compute capability, such as "8.9". Raises what Cuda.call raises.

    Creates no CUDA context, which would take hundreds of megabytes of device memory.
    """
    properties = cuda.call("cudaGetDeviceProperties", cuda.device, doing="asking what the GPU is", enter=False)
    name = properties.name
    name = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
    return name.rstrip("\0"), f"{properties.major}.{properties.minor}"


def _driver(cuda: Cuda) -> str:
    """Return the driver's version or, if the kernel does not report it, the CUDA version that it supports."""
    try:
        found = _DRIVER.search(_DRIVER_FILE.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        found = None
    if found:
        return found.group()
    version = int(cuda.call("cudaDriverGetVersion", doing="asking for the driver's version", enter=False))
    return f"CUDA {version // 1000}.{version % 1000 // 10}"
