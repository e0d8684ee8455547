"""Whether an execution provider of ONNX Runtime can start: asked before a session is made, with the remedy.

ONNX Runtime lists every provider that it was built with, whether or not the libraries that it needs are there.
"""

__all__ = [
    "CUDA",
    "GPU_CAPABILITIES",
    "RTX",
    "TENSORRT",
    "plugin_command",
    "plugin_problem",
    "provider_problem",
]

import contextlib
import importlib
import io
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sdxl_trt.engines.backends.cuda import Driver, Problem, find_driver, pip_install
from sdxl_trt.engines.backends.ort.libraries import load_problem, needed_libraries

CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
RTX = "NvTensorRTRTXExecutionProvider"
GPU_CAPABILITIES = "8.6, 8.9, or 12.0 and later"
"""The compute capabilities that the RTX plugin supports."""

_PLUGIN = "onnxruntime-ep-nv-tensorrt-rtx"
_LIBRARIES = {CUDA: "onnxruntime_providers_cuda", TENSORRT: "onnxruntime_providers_tensorrt"}
# ONNX Runtime opens it at the first convolution, so it is not among the needed ones, and every bundle has convolutions.
_OPENED_LATER = {CUDA: ("libcudnn.so.9",), TENSORRT: ()}
# The TensorRT provider is built for TensorRT 10, which cannot be installed beside TensorRT 11.
_CLASSIC = "make a new environment and run there: pip install 'sdxl-trt[ort-tensorrt]'"


def provider_problem(ort: Any, name: str) -> Problem | None:
    """Return why the execution provider `name`, CUDA or TENSORRT, of module `ort` cannot start, or None if it can.

    Loads the libraries that it needs, also from pip's packages; creates no session.
    """
    driver = find_driver()
    available = ort.get_available_providers()
    if name not in available:
        return Problem(f"this ONNX Runtime has {', '.join(available)}, not {name}", _remedy(name, _reinstall()))
    if driver.problem is not None:
        return driver.problem
    library = _library(ort, name)
    if not library.is_file():
        return Problem(f"{library.name} is missing from the package onnxruntime-gpu", _reinstall())
    major = str(getattr(ort, "cuda_version", "")).partition(".")[0]
    mismatch = driver.mismatch("this ONNX Runtime", int(major)) if major.isdigit() else None
    if mismatch:
        return Problem(mismatch, _remedy(name, _reinstall()))
    _preload(ort)
    if name == TENSORRT:
        # Its __init__ loads TensorRT's libraries, which are outside the loader's search path.
        with contextlib.suppress(ImportError, OSError):
            importlib.import_module("tensorrt_libs")
    reason = _unloadable(library, _OPENED_LATER[name])
    return Problem(reason, _remedy(name, pip_install("gpu"))) if reason else None


def _library(ort: Any, name: str) -> Path:
    windows = sys.platform == "win32"
    return Path(ort.__file__).parent / "capi" / (f"{_LIBRARIES[name]}.dll" if windows else f"lib{_LIBRARIES[name]}.so")


def _unloadable(library: Path, later: Iterable[str]) -> str | None:
    """Return why `library` would not load, or None: on Linux without loading itself, which needs its host's symbols."""
    if sys.platform == "win32":
        return load_problem(str(library))
    else:  # noqa: RET505 - the type checker reads the branches of a platform
        try:
            needed = needed_libraries(library)
        except (OSError, ValueError) as exc:
            return f"{library.name} cannot be read ({' '.join(str(exc).split())})"
        return next(filter(None, map(load_problem, [*needed, *later])), None)


def _remedy(name: str, for_cuda: str) -> str:
    """Return what makes the provider `name` start: for CUDA `for_cuda`, for TensorRT the least that the GPU needs."""
    driver = find_driver()
    if name == CUDA:
        return for_cuda
    if _plugin_supports_gpu(driver):
        return plugin_command()
    return _CLASSIC if driver.variant == "cu13" else f"use --provider tensorrt instead: {pip_install('tensorrt')}"


def _reinstall() -> str:
    """Return the command for an environment whose ONNX Runtime is not the one that it needs."""
    # The packages share one folder: removing one of them damages the other.
    installed = [each for each in ("onnxruntime", "onnxruntime-gpu") if _installed(each)]
    remove = f"pip uninstall -y {' '.join(installed)} && " if installed else ""
    return remove + pip_install("gpu")


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def _plugin_supports_gpu(driver: Driver) -> bool:
    return bool(driver.gpus) and (driver.gpus[0].capability in {(8, 6), (8, 9)} or driver.gpus[0].capability >= (12, 0))


def plugin_problem() -> Problem | None:
    """Return why the driver cannot run the RTX plugin that is installed, or None if it can."""
    mismatch = find_driver().mismatch(f"{_PLUGIN}-cu13", 13)
    if mismatch is None or not _installed(f"{_PLUGIN}-cu13"):
        return None
    return Problem(mismatch, f"pip uninstall -y {_PLUGIN}-cu13 && {plugin_command()}")


def plugin_command() -> str:
    """Return the command that installs the RTX plugin for the CUDA that the driver supports."""
    return f"pip install {_PLUGIN}-{find_driver().variant}"


@cache
def _preload(ort: Any) -> None:
    """Load CUDA and cuDNN from pip's packages, which are outside the loader's search path."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the libraries that it does not find
        ort.preload_dlls()
