"""A real TensorRT parser and builder on a machine without a GPU, assembled from two public wheels.

NVIDIA's Python binding of TensorRT (``tensorrt-cu12-bindings``) is loaded with the libraries of TensorRT for RTX
(from ``onnxruntime-ep-nv-tensorrt-rtx-cu12``), whose parser and builder need no driver. NVIDIA does not support this
combination. It serves tests and measurements only and is not shipped; its results are not those of TensorRT on a GPU,
and plans cannot be loaded, refitted or timed here. The wheels are development dependencies.

A child process with the environment of `child_environment` finds it under the names ``tensorrt`` and
``tensorrt_rtx``, which the engines import.
"""

__all__ = ["CACHE_VARIABLE", "assemble", "child_environment", "load", "unavailable"]

import hashlib
import importlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from filelock import FileLock

BINDING = "tensorrt-cu12-bindings"
LIBRARIES = "onnxruntime-ep-nv-tensorrt-rtx-cu12"
CACHE_VARIABLE = "XDG_CACHE_HOME"
PACKAGE = "tensorrt_bindings"
# The binding calls only this function of the plugin library, which the RTX wheel does not include.
PLUGIN = "libnvinfer_plugin.so.11"
PLUGIN_SOURCE = "int initLibNvInferPlugins(void *logger, const char *name) { (void)logger; (void)name; return 1; }\n"
# Two packages that re-export that module. The library lacks the binding's call for streams: it reaches another
# function, reports success and writes nothing.
SHIM = """\
from tensorrt_bindings import *

if hasattr(Builder, "build_serialized_network_to_stream"):
    del Builder.build_serialized_network_to_stream
__version__ = "{version}"
"""
LINKS = {
    "libnvinfer.so.11": "libtensorrt_rtx.so.1",
    "libtensorrt_rtx.so.1": "libtensorrt_rtx.so.1",
    "libnvonnxparser.so.11": "libtensorrt_onnxparser_rtx.so.1",
}


def unavailable() -> str | None:
    """Return why the parser is unavailable on this machine, or None if it is available."""
    here = f"{platform.system()} on {platform.machine()}"
    if here != "Linux on x86_64":
        return f"the wheels are for Linux on x86_64, but this is {here}"
    missing = [name for name in (BINDING, LIBRARIES) if _installed(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed; pip install -e '.[dev]'"
    return None if _compiler() else "there is no C compiler (cc) to build the stand-in for the plugin library"


def assemble(cache: Path | None = None) -> Path:
    """Return a folder for ``sys.path`` with a working ``tensorrt_bindings``, assembled once for all processes.

    It is in `cache`, by default ``$XDG_CACHE_HOME/sdxl-trt`` or ``~/.cache/sdxl-trt``. Raises RuntimeError with the
    reason if it is `unavailable`.
    """
    reason = unavailable()
    if reason:
        raise RuntimeError(f"no TensorRT parser: {reason}")
    cache = cache or Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache") / "sdxl-trt"
    binding, libraries = distribution(BINDING), distribution(LIBRARIES)
    folder = cache / _key(binding, libraries)
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{folder.name}.lock"):
        if not folder.is_dir():
            # Renamed into place when complete, so that a partial folder is never used.
            with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=cache) as partial:
                _fill(Path(partial) / "whole", binding, libraries)
                (Path(partial) / "whole").rename(folder)
    return folder


def child_environment(folder: Path) -> dict[str, str]:
    """Return a copy of this process's environment with which a child finds both flavours in an assembled `folder`."""
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def load(folder: Path) -> Any:
    """Import ``tensorrt_bindings`` from an assembled `folder`; it stays loaded, so prefer a separate process."""
    sys.path.insert(0, str(folder))
    return importlib.import_module(PACKAGE)


def _installed(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CC", "cc"))


def _key(binding: Distribution, libraries: Distribution) -> str:
    """Return the folder's name from its contents: versions, interpreter, shims, and the environment it links to."""
    home = hashlib.sha256(f"{libraries.locate_file('')} {SHIM}".encode()).hexdigest()[:12]
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return f"tensorrt-on-cpu-{binding.version}-{libraries.version}-{python}-{home}"


def _fill(folder: Path, binding: Distribution, libraries: Distribution) -> None:
    package = folder / PACKAGE
    shutil.copytree(str(binding.locate_file(PACKAGE)), package, ignore=shutil.ignore_patterns("__pycache__"))
    home = Path(str(libraries.locate_file(LIBRARIES.removesuffix("-cu12").replace("-", "_"))))
    for link, stem in LINKS.items():
        (package / link).symlink_to(_only(home, stem))
    command = [str(_compiler()), "-shared", "-fPIC", "-x", "c", "-o", str(package / PLUGIN), "-"]
    done = subprocess.run(command, input=PLUGIN_SOURCE, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise RuntimeError(f"the C compiler failed: {done.stderr.strip()}")
    versions = {"tensorrt": binding.version, "tensorrt_rtx": _library_version(home)}
    for name, version in versions.items():
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(SHIM.format(version=version), encoding="utf-8")


def _library_version(home: Path) -> str:
    return _only(home, LINKS["libtensorrt_rtx.so.1"]).name.partition(".so.")[2]


def _only(folder: Path, stem: str) -> Path:
    """Return the only library in `folder` whose name starts with `stem`. Raises RuntimeError unless there is one.

    Links do not count: the plugin's package makes some beside its libraries when it is imported.
    """
    found = sorted(path for path in folder.glob(f"{stem}*") if not path.is_symlink())
    if len(found) != 1:
        raise RuntimeError(f"{folder}: expected one {stem}.*, found {[path.name for path in found]}")
    return found[0].resolve()
