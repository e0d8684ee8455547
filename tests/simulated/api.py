"""The stand-in for `tensorrt`: the module, its enumerations, loggers, stream readers and the runtime."""

__all__ = ["ILogger", "IStreamReaderV2", "Logger", "Runtime", "make_tensorrt"]

import hashlib
import sys
import types
import weakref
from typing import Any

import msgspec
import numpy as np

from simulated.binding import Bound, specification
from simulated.contexts import IExecutionContext
from simulated.device import current
from simulated.engines import ICudaEngine, IRuntimeConfig, open_engine
from simulated.enumerations import ENUMERATIONS, DataType, SeekPosition, Severity
from simulated.errors import SimulationError
from simulated.plans import HEAD, MAGIC, Plan, decode
from simulated.shapes import Dims

_CHUNK = 1 << 12


class ILogger(Bound, original="ILogger"):
    """Base of loggers written in Python."""

    Severity = Severity

    def __init__(self) -> None:
        pass

    def log(self, severity: Any, msg: str) -> None:
        raise RuntimeError('Tried to call pure virtual function "ILogger::log"')


class Logger(ILogger, original="Logger"):
    """Prints messages of `min_severity` or worse."""

    Severity = Severity

    def __init__(self, min_severity: Any = Severity.WARNING) -> None:
        object.__setattr__(self, "_severity", min_severity)

    @property
    def min_severity(self) -> Any:
        return self._severity

    @min_severity.setter
    def min_severity(self, value: Any) -> None:
        object.__setattr__(self, "_severity", value)

    def log(self, severity: Any, msg: str) -> None:
        if severity.value <= self._severity.value:
            sys.stderr.write(f"[TRT] [{severity.name[0]}] {msg}\n")


for _each in (ILogger, Logger):
    for _name, _member in Severity.__members__.items():
        setattr(_each, _name, _member)


class IStreamReaderV2(Bound, original="IStreamReaderV2"):
    """Base of readers that read a plan in pieces; a subclass overrides read(num_bytes, stream) and seek."""

    def __init__(self) -> None:
        pass

    def read(self, destination: Any, num_bytes: int, stream: int) -> int:
        raise RuntimeError('Tried to call pure virtual function "IStreamReaderV2::read"')

    def seek(self, offset: int, where: Any) -> bool:
        raise RuntimeError('Tried to call pure virtual function "IStreamReaderV2::seek"')


class Runtime(Bound, original="Runtime"):
    """Deserializes plans. It keeps its logger alive, and its engines keep it alive."""

    def __init__(self, logger: Any) -> None:
        current().living["Runtime"] += 1
        object.__setattr__(self, "_state", {"logger": logger, "log": _log_function(current(), logger), "threads": 1,
                                            "busy": False})  # fmt: skip
        weakref.finalize(self, current().living.subtract, ["Runtime"]).atexit = False

    @property
    def logger(self) -> Any:
        return self._state["logger"]

    @property
    def max_threads(self) -> int:
        return int(self._state["threads"])

    @max_threads.setter
    def max_threads(self, value: int) -> None:
        self._state["threads"] = value

    @property
    def engine_host_code_allowed(self) -> bool:
        return False

    @engine_host_code_allowed.setter
    def engine_host_code_allowed(self, value: bool) -> None:
        if value:
            raise SimulationError("engine_host_code_allowed was set: plans could run code on the host")

    def deserialize_cuda_engine(self, serialized_engine: Any = None, stream_reader_v2: Any = None) -> Any:
        device = current()
        content = bytes(serialized_engine) if stream_reader_v2 is None else _read(stream_reader_v2)
        digest = hashlib.sha256(content).hexdigest()
        plan = decode(content)
        if self._state["busy"]:
            raise SimulationError("two threads deserialize with one runtime at the same time; it is not thread-safe")
        self._state["busy"] = True
        try:
            with device.loading("deserialize") as load:
                reason = _refusal(device, plan, load)
        finally:
            self._state["busy"] = False
        if reason or plan is None:
            self._state["log"](reason)
            return None
        engine = open_engine(self, device, msgspec.structs.replace(plan, digest=digest))
        if engine is not None:
            device.deserialized.append(digest)
        return engine


def _log_function(device: Any, logger: Any) -> Any:
    """Return a function that logs a message; it does not keep the runtime alive."""

    def log(message: str, severity: Any = Severity.ERROR) -> None:
        device.logged.append((severity.name, message))
        logger.log(severity, message)

    return log


def _refusal(device: Any, plan: Plan | None, load: Any) -> str:
    """Return TensorRT's error for a plan that it rejects, or ""."""
    doing = "IRuntime::deserializeCudaEngine: Error Code"
    if plan is None:
        return f"{doing} 1: Serialization (assertion magicTagRead == kMAGIC_TAG failed. Magic tag does not match)"
    if device.sticky:
        return f"{doing} 1: Cuda Runtime (an illegal memory access was encountered)"
    if device.take("deserialize"):
        return f"{doing} 4: Internal Error (Engine deserialization failed.)"
    if load.spoiled:
        return f"{doing} 1: Cuda Runtime (operation not permitted when stream is capturing)"
    if plan.graph + plan.weights not in device.sources:
        raise SimulationError(f"the plan of {plan.component} refers to a graph that no simulated bundle has")
    return _mismatch(device, plan, doing)


def _mismatch(device: Any, plan: Plan, doing: str) -> str:
    built, here = plan.environment, f"{device.compute_capability[0]}.{device.compute_capability[1]}"
    if built.tensorrt != device.version:
        return f"{doing} 1: Serialization (assertion stdVersionRead == kSERIALIZATION_VERSION failed.)"
    if built.compute_capability == "any" and device.compute_capability < (8, 0):
        return f"{doing} 1: Serialization (the engine targets compute capability 8.0 and later, this device has {here})"
    if built.compute_capability not in ("any", here):
        return (
            f"The engine plan file is generated on an incompatible device, expecting compute {here} got compute"
            f" {built.compute_capability}, please rebuild."
        )
    return ""


def _read(reader: Any) -> bytes:
    """Read a plan as TensorRT does: its head, then from the start again, whole, in pieces."""
    head = _exactly(reader, HEAD)
    if len(head) < HEAD or head[: len(MAGIC)] != MAGIC:
        return head
    if not reader.seek(0, SeekPosition.SET):
        return b""
    return _exactly(reader, HEAD + int.from_bytes(head[len(MAGIC) :], "little"))


def _exactly(reader: Any, size: int) -> bytes:
    content = b""
    while len(content) < size:
        wanted = min(_CHUNK, size - len(content))
        try:
            piece = bytes(reader.read(wanted, 0))
        except Exception as exc:  # noqa: BLE001 - the real binding prints it, and the read fails
            sys.stderr.write(f"[ERROR] Exception caught in read(): {exc}\n")
            return content
        if len(piece) > wanted:
            raise SimulationError(f"a stream reader returned {len(piece)} bytes, {wanted} were requested")
        if not piece:
            break
        content += piece
    return content


_NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT8": np.int8, "INT32": np.int32, "INT64": np.int64,
          "BOOL": np.bool_, "UINT8": np.uint8}  # fmt: skip


def nptype(trt_type: Any) -> Any:
    """Return the numpy type of a DataType; raise TypeError if numpy has none."""
    if trt_type.name not in _NUMPY:
        raise TypeError(f"Could not resolve TensorRT datatype to an equivalent numpy datatype: {trt_type}")
    return _NUMPY[trt_type.name]


def volume(iterable: Any) -> int:
    """Return the product of the sizes."""
    return int(np.prod(list(iterable)))


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name in specification()["names"]:
            raise SimulationError(f"tensorrt.{name} is not simulated; add it to tests/simulated")
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


def make_tensorrt(name: str, version: str) -> types.ModuleType:
    """Return the stand-in as a module called `name`: `tensorrt` or `tensorrt_rtx`."""
    module = _Module(name)
    names = specification()["names"]
    classes = (Dims, ICudaEngine, IExecutionContext, ILogger, IRuntimeConfig, IStreamReaderV2, Logger, Runtime)
    public = {**{each.original: each for each in classes}, **ENUMERATIONS, "nptype": nptype, "volume": volume}
    aliases = {alias: value for alias, value in names.items() if str(value).startswith("DataType.")}
    public |= {alias: getattr(DataType, value.partition(".")[2]) for alias, value in aliases.items()}
    if unknown := public.keys() - names.keys():
        raise SimulationError(f"the real binding has no {sorted(unknown)}")
    for key, value in public.items():
        setattr(module, key, value)
    module.__version__ = version  # type: ignore[attr-defined]
    return module
