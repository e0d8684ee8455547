"""Read TensorRT's real Python binding and print what it offers as JSON: the stand-ins are held against that.

It runs in a process of its own, since NVIDIA's libraries stay loaded where they were loaded once:
``python tests/simulated/read_binding.py > tests/simulated/tensorrt_11_4.json`` renews the file that lies here.
"""

import inspect
import json
import re
import sys
from typing import Any

from sdxl_trt.benchmarks.full_size.tensorrt_on_cpu import assemble, load

CLASSES = (
    "DataType", "Dims", "EngineStat", "ExecutionContextAllocationStrategy", "ICudaEngine", "IExecutionContext",
    "ILogger", "IRuntimeConfig", "IStreamReaderV2", "Logger", "Runtime", "SeekPosition", "TensorFormat", "TensorIOMode",
    "TensorLocation",
)  # fmt: skip
"""The classes that are simulated; of all others only the names are kept."""
# What Python itself gives every class, and what pybind11 keeps for itself.
_INHERITED = {*dir(object), "__module__", "__annotations__", "__del__"} - {"__init__", "__eq__", "__str__"}
_SLOTS = ("wrapper_descriptor", "pybind11_static_property")
_PREFIX = re.compile(r"\btensorrt_bindings\.tensorrt\.")
_OVERLOAD = re.compile(r"^\d+\. ", re.MULTILINE)


def signatures(name: str, callable_: Any) -> list[str]:
    """Return the signatures of a method, one an overload, as ``(self: Class, name: type) -> type``."""
    text = _PREFIX.sub("", callable_.__doc__ or "")
    heads = [part.partition("\n")[0] for part in _OVERLOAD.split(text)[1:]] or [text.strip().partition("\n")[0]]
    found = [head.removeprefix(name) for head in heads if head.startswith(f"{name}(")]
    return found or [str(inspect.signature(callable_))]


def describe_class(cls: Any) -> dict[str, Any]:
    """Return the methods, the properties (and whether they can be read and set) and the enum members of a class."""
    members = {name: int(value) for name, value in getattr(cls, "__members__", {}).items()}
    if members:
        return {"members": members}
    methods, properties = {}, {}
    for name, value in sorted(vars(cls).items()):
        if name in _INHERITED or name.startswith(("_pybind11", "__pybind11")) or type(value).__name__ in _SLOTS:
            continue
        if isinstance(value, property):
            properties[name] = "".join(("r" * (value.fget is not None), "w" * (value.fset is not None)))
        elif callable(value) and not isinstance(value, type):
            methods[name] = signatures(name, value)
    bases = [base.__name__ for base in cls.__bases__ if base.__name__ != "pybind11_object"]
    nested = {name: describe_class(value) for name, value in vars(cls).items() if isinstance(value, type)}
    parts = {"bases": bases, "methods": methods, "nested": nested, "properties": properties}
    return {key: value for key, value in parts.items() if value}


def describe(trt: Any) -> dict[str, Any]:
    """Return the version, every public name and its kind, and the simulated classes of the binding."""
    names: dict[str, str | list[str]] = {}
    for name, value in sorted(vars(trt).items()):
        if name.startswith("_") or inspect.ismodule(value):
            continue
        if isinstance(value, type):
            names[name] = "class"
        elif callable(value):
            names[name] = signatures(name, value)
        else:
            names[name] = str(value)
    classes = {name: describe_class(getattr(trt, name)) for name in CLASSES}
    return {"version": trt.__version__, "classes": classes, "names": names}


if __name__ == "__main__":
    json.dump(describe(load(assemble())), sys.stdout, indent=1)
    sys.stdout.write("\n")
