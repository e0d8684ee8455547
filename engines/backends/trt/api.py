"""TensorRT's Python module, imported on demand: minimum version, logger and version, for both flavours."""

__all__ = ["Messages", "Sink", "library_version", "make_logger", "tensorrt_module"]

import contextlib
import importlib
import re
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from sdxl_trt.engines.backends.cuda import pip_install
from sdxl_trt.engines.bundle import Flavour
from sdxl_trt.engines.errors import IncompatibleError
from sdxl_trt.engines.host import add_dll_folders

Sink = Callable[[str, str], None]
"""Receives a message's severity (INTERNAL_ERROR, ERROR, WARNING, INFO or VERBOSE) and text, from any thread."""

_MODULES: dict[Flavour, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
# TensorRT 11 is strongly typed only, and fixes vulnerabilities of older runtimes in reading plans.
_FLOORS: dict[Flavour, tuple[int, int]] = {"tensorrt": (11, 0), "tensorrt-rtx": (1, 0)}
_ERRORS = ("INTERNAL_ERROR", "ERROR")
_KEPT = (*_ERRORS, "WARNING")
_MOST_KEPT = 64
_MOST_SHOWN = 300


def tensorrt_module(flavour: Flavour) -> Any:
    """Import and return TensorRT's module; raise IncompatibleError if it is missing, broken or too old."""
    name, floor = _MODULES[flavour], _FLOORS[flavour]
    add_dll_folders()
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError) as exc:
        reason = " ".join(str(exc).split())
        raise IncompatibleError(f"provider {flavour} needs {name} ({reason}); {pip_install(flavour)}") from exc
    version = library_version(module)
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < floor:
        needed = ".".join(map(str, floor))
        raise IncompatibleError(f"{name} {version} is too old, {needed} or later is required; {pip_install(flavour)}")
    return module


def library_version(trt: Any) -> str:
    """Return TensorRT's version with its build number, such as "11.4.0.106"; "0" if unknown."""
    # The package `tensorrt` re-exports the public names of `tensorrt_bindings`, and a dunder is not one.
    home = sys.modules.get(trt.Runtime.__module__.partition(".")[0])
    return str(getattr(trt, "__version__", None) or getattr(home, "__version__", "0"))


def make_logger(trt: Any, sink: Sink) -> Any:
    """Return an ILogger that passes every message to `sink` and prints nothing.

    It must outlive every object that uses it. Exceptions of `sink` are dropped: the calling C++ cannot unwind them.
    """

    class Logger(trt.ILogger):  # type: ignore[misc] # the base is known at run time only
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # the binding requires this call instead of super()

        def log(self, severity: Any, msg: str) -> None:
            with contextlib.suppress(Exception):
                sink(severity.name, msg)

    return Logger()


class Messages:
    """A sink that keeps the latest errors and warnings of each thread, to explain a failed call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: deque[tuple[int, str, str]] = deque(maxlen=_MOST_KEPT)

    def __call__(self, severity: str, text: str) -> None:
        """Keep an error or a warning, on one line; see Sink."""
        if severity in _KEPT:
            with self._lock:
                self._kept.append((threading.get_ident(), severity, " ".join(text.split())))

    def forget(self) -> None:
        """Drop the messages of the calling thread."""
        me = threading.get_ident()
        with self._lock:
            self._kept = deque((entry for entry in self._kept if entry[0] != me), maxlen=_MOST_KEPT)

    def errors(self) -> list[str]:
        """Return the errors of the calling thread since `forget`, oldest first, each on one line."""
        me = threading.get_ident()
        with self._lock:
            return [text for thread, severity, text in self._kept if thread == me and severity in _ERRORS]

    def reason(self, otherwise: str = "") -> str:
        """Return the first error of the calling thread, since later ones mostly repeat it.

        Without errors, returns `otherwise`, or else "it gave no reason".
        """
        reasons = [*self.errors(), " ".join(otherwise.split()), "it gave no reason"]
        return next(text for text in reasons if text)[:_MOST_SHOWN]
