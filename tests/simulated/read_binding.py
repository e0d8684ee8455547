"""Read TensorRT's real Python binding and print its interface as JSON, the specification of the stand-ins.

It runs in its own process, since NVIDIA's libraries cannot be unloaded. In this folder,
``python read_binding.py > tensorrt_11_4.json`` updates the specification. The binding of TensorRT for RTX can be read
without a GPU too: after ``pip install tensorrt-rtx-cu12``,
``python read_binding.py tensorrt_rtx_bindings > tensorrt_rtx_1_7.json`` updates its file.
"""

import importlib
import inspect
import json
import re
import sys
from typing import Any

CLASSES = (
    "DataType", "Dims", "EngineStat", "ExecutionContextAllocationStrategy", "ICudaEngine", "IExecutionContext",
    "ILogger", "IRuntimeConfig", "IStreamReaderV2", "Logger", "Runtime", "SeekPosition", "TensorFormat", "TensorIOMode",
    "TensorLocation",
)  # fmt: skip
"""The simulated classes; the file has only the names of all others."""
RTX_CLASSES = ("CudaGraphStrategy", "IRuntimeCache")
"""The classes that only TensorRT for RTX has, and that the engines use."""
# Members that every Python class has, and pybind11's own.
_INHERITED = {*dir(object), "__module__", "__annotations__", "__del__"} - {"__init__", "__eq__", "__str__"}
_SLOTS = ("wrapper_descriptor", "pybind11_static_property")
_PREFIX = re.compile(r"\btensorrt_(?:rtx_)?bindings\.tensorrt(?:_rtx)?\.|\bnvinfer1::")
_OVERLOAD = re.compile(r"^\d+\. ", re.MULTILINE)


def signatures(name: str, callable_: Any) -> list[str]:
    """Return the signatures of a method, one per overload, as ``(self: Class, name: type) -> type``."""
    text = _PREFIX.sub("", callable_.__doc__ or "")
    heads = [part.partition("\n")[0] for part in _OVERLOAD.split(text)[1:]] or [text.strip().partition("\n")[0]]
    found = [head.removeprefix(name) for head in heads if head.startswith(f"{name}(")]
    return found or [str(inspect.signature(callable_))]


def describe_class(cls: Any) -> dict[str, Any]:
    """Return the enum members of a class, or its methods and properties ("r": readable, "w": settable)."""
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
    """Return the binding's version, every public name with its kind, and the simulated classes."""
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
    wanted = CLASSES + RTX_CLASSES if hasattr(trt, "CudaGraphStrategy") else CLASSES
    classes = {name: describe_class(getattr(trt, name)) for name in wanted}
    return {"version": trt.__version__, "classes": classes, "names": names}


def _binding(names: list[str]) -> Any:
    if names:
        return importlib.import_module(names[0])
    from sdxl_trt.benchmarks.full_size.tensorrt_on_cpu import assemble, load

    return load(assemble())


if __name__ == "__main__":
    json.dump(describe(_binding(sys.argv[1:])), sys.stdout, indent=1)
    sys.stdout.write("\n")
