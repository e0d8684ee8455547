"""Whether a provider can start on this machine: one check a process, since a broken library can end the process.

`python -m sdxl_trt.engines.inspection.provider_checks PROVIDER` prints the result as one JSON line.
"""

__all__ = ["PROVIDERS", "check_provider", "installed_version"]

import importlib
import json
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sdxl_trt.engines.backends.cuda import Driver, Problem, find_driver, pip_install
from sdxl_trt.engines.backends.ov import openvino_core
from sdxl_trt.engines.errors import IncompatibleError, SdxlTrtError

PROVIDERS = ("ort-cpu", "ort-cuda", "ort-tensorrt", "tensorrt", "tensorrt-rtx", "openvino")
_TENSORRT_FLOOR = (12, 2)
"""The lowest driver that runs TensorRT for CUDA 12: r535."""
_CAPABILITY_FLOORS = {"tensorrt": (7, 5), "tensorrt-rtx": (8, 0)}


def check_provider(provider: str) -> Problem | None:
    """Return why `provider` cannot start, or None if it can; loads its libraries, nothing of a bundle. Never raises."""
    try:
        if provider == "ort-cpu":
            _onnxruntime(provider)
        elif provider == "openvino":
            openvino_core()
        elif provider.startswith("ort-"):
            return _check_onnxruntime(provider)
        else:
            return _check_tensorrt(provider)
    except SdxlTrtError as exc:
        return _split(re.sub(f"^provider {provider}(:| cannot start:|) ", "", str(exc)))
    except Exception as exc:  # noqa: BLE001 - a broken package raises anything
        reason = " ".join(f"{type(exc).__name__}: {exc}".split())
        return Problem(reason[:200], _install(provider).replace("install", "install --force-reinstall", 1))
    return None


def _split(message: str) -> Problem:
    """Return the two parts of an error's message, whose last clause is the remedy."""
    reason, separator, remedy = message.rpartition("; ")
    return Problem(reason, remedy) if separator else Problem(message, "check it with nvidia-smi")


def _install(provider: str) -> str:
    if provider in ("ort-cpu", "openvino"):
        return f"pip install 'sdxl-trt[{'cpu' if provider == 'ort-cpu' else provider}]'"
    return pip_install("gpu" if provider.startswith("ort-") else provider)


def _onnxruntime(provider: str) -> Any:
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as exc:
        reason = " ".join(str(exc).split())
        raise IncompatibleError(f"onnxruntime does not import ({reason}); {_install(provider)}") from exc


def _check_onnxruntime(provider: str) -> Problem | None:
    from sdxl_trt.engines.backends.ort import (  # noqa: PLC0415
        CUDA,
        TENSORRT,
        choose_provider,
        plugin_devices,
        provider_problem,
    )

    if find_driver().problem is not None:
        return find_driver().problem
    ort = _onnxruntime(provider)
    try:
        chosen = choose_provider(ort, "ort-cuda" if provider == "ort-cuda" else "ort-tensorrt")
    except IncompatibleError:
        return provider_problem(ort, CUDA if provider == "ort-cuda" else TENSORRT)
    if chosen.plugin:
        plugin_devices(ort)
    return None


def _check_tensorrt(flavour: str) -> Problem | None:
    from sdxl_trt.engines.backends.cuda import cuda_runtime  # noqa: PLC0415
    from sdxl_trt.engines.backends.trt import device_available, tensorrt_module  # noqa: PLC0415

    driver = find_driver()
    problem = driver.problem or _wrong_cuda(flavour, driver) or _unsupported(flavour, driver)
    if problem is not None:
        return problem
    tensorrt_module("tensorrt" if flavour == "tensorrt" else "tensorrt-rtx")
    cuda_runtime()
    reason = device_available()
    return _split(reason) if reason else None


def _wrong_cuda(flavour: str, driver: Driver) -> Problem | None:
    """Return the problem of packages for a newer CUDA than the driver's."""
    suspects = {f"{flavour}-cu13{part}": "13" for part in ("", "-libs", "-bindings")}
    suspects["cuda-bindings"] = (installed_version("cuda-bindings") or "0").partition(".")[0]
    newer = {
        name: mismatch
        for name, major in suspects.items()
        if installed_version(name) and (mismatch := driver.mismatch(name, int(major)))
    }
    if not newer:
        return None
    return Problem(next(iter(newer.values())), f"pip uninstall -y {' '.join(newer)} && {pip_install(flavour)}")


def _unsupported(flavour: str, driver: Driver) -> Problem | None:
    if driver.cuda is not None and driver.cuda < _TENSORRT_FLOOR:
        major, minor = driver.cuda
        return Problem(
            f"TensorRT needs NVIDIA driver r535, and this one supports only CUDA {major}.{minor}",
            "install the NVIDIA driver r580 or newer",
        )
    floor = _CAPABILITY_FLOORS[flavour]
    if driver.gpus and driver.gpus[0].capability < floor:
        (major, minor), (least, part) = driver.gpus[0].capability, floor
        return Problem(
            f"the GPU has compute capability {major}.{minor}, and {flavour} needs {least}.{part} or higher",
            "use --provider tensorrt" if (major, minor) >= _CAPABILITY_FLOORS["tensorrt"] else "use --provider ort-cpu",
        )
    return None


def installed_version(package: str) -> str | None:
    """Return the installed version of a pip package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.stdout.write(f"{json.dumps(check_provider(sys.argv[1]))}\n")
