"""A simulated plan: a small file with the digests of a graph and its weights, and its computation on a CPU."""

__all__ = ["Execution", "Plan", "compute", "decode", "encode", "output_shape"]

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines.bundle.manifest import TensorSpec
from sdxl_trt.engines.bundle.plan_record import Environment
from sdxl_trt.engines.bundle.profile import Profile
from sdxl_trt.engines.bundle.records import Record
from sdxl_trt.engines.engine import numpy_dtype

MAGIC = b"SIMPLAN\0"
HEAD = len(MAGIC) + 8
ALIGNMENT = 256
_DIM = re.compile(r"(?:(\d+)\*)?([a-z_]\w*)(?:/(\d+))?")

Shapes = Mapping[str, tuple[int, ...]]


class Plan(Record, frozen=True, kw_only=True):
    """The contents of a plan. `activations` are bytes per profile; `digest` is the file's, set after reading."""

    component: str
    graph: str
    weights: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...]
    activations: tuple[int, ...]
    weights_bytes: int
    streamable: int
    environment: Environment
    digest: str = ""

    def tensors(self) -> dict[str, TensorSpec]:
        """Return {name: spec} of inputs and outputs, inputs first."""
        return {spec.name: spec for spec in (*self.inputs, *self.outputs)}

    def needed(self, profile: int, shapes: Shapes) -> int:
        """Return the activation bytes for these shapes: the profile's figure, scaled by the size of the inputs."""
        largest = sum(int(np.prod(self.profiles[profile].shapes[spec.name][2])) for spec in self.inputs)
        own = sum(int(np.prod(shapes[spec.name])) for spec in self.inputs)
        return min(rounded(-(-self.activations[profile] * own // largest)), self.activations[profile])


class Execution(NamedTuple):
    """One execution of a plan: its profile, the shapes of all tensors, and whether a graph ran or weights streamed."""

    plan: Plan
    profile: int
    shapes: Shapes
    captured: bool
    streaming: bool


def rounded(size: int) -> int:
    """Return `size` rounded up to a multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def encode(plan: Plan) -> bytes:
    """Return the bytes of a plan's file: a magic number, the length of the body, and the body."""
    body = msgspec.json.encode(plan, order="deterministic")
    return MAGIC + len(body).to_bytes(8, "little") + body


def decode(content: bytes) -> Plan | None:
    """Return the plan of `content`, or None if `encode` did not write it."""
    if content[: len(MAGIC)] != MAGIC or len(content) != HEAD + int.from_bytes(content[len(MAGIC) : HEAD], "little"):
        return None
    try:
        return msgspec.json.decode(content[HEAD:], type=Plan)
    except msgspec.DecodeError:
        return None


def output_shape(inputs: Iterable[TensorSpec], output: TensorSpec, shapes: Shapes) -> tuple[int, ...]:
    """Return the shape of an output for `inputs` of these shapes; axes may be like ``2*height`` or ``height/2``."""
    axes = {
        dim: size
        for spec in inputs
        for dim, size in zip(spec.shape, shapes[spec.name], strict=True)
        if isinstance(dim, str)
    }

    def size(dim: int | str) -> int:
        if isinstance(dim, int):
            return dim
        match = _DIM.fullmatch(dim)
        if match is None:
            raise ValueError(f"output {output.name} has an axis {dim!r} that the simulation cannot compute")
        factor, axis, divisor = match.groups()
        return axes[axis] * int(factor or 1) // int(divisor or 1)

    return tuple(size(dim) for dim in output.shape)


_sessions: dict[tuple[str, str], Any] = {}
_MOST_SESSIONS = 12


def _session(plan: Plan, graph: Path, weights: Path) -> Any:
    """Return the session of a plan's graph; tests share sessions, which are keyed by digest."""
    import onnxruntime

    key = (plan.graph, plan.weights)
    if key not in _sessions:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        content = weights.read_bytes()
        options.add_external_initializers_from_files_in_memory([weights.name], [content], [len(content)])
        while len(_sessions) >= _MOST_SESSIONS:
            _sessions.pop(next(iter(_sessions)))
        _sessions[key] = onnxruntime.InferenceSession(graph.read_bytes(), options, providers=["CPUExecutionProvider"])
    return _sessions[key]


def compute(
    plan: Plan, sources: Mapping[str, tuple[Path, Path]], inputs: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """Return every output of the plan's graph, computed by ONNX Runtime on the CPU."""
    session = _session(plan, *sources[plan.graph + plan.weights])
    names = [spec.name for spec in plan.outputs]
    results = session.run(names, dict(inputs))
    return {
        spec.name: np.ascontiguousarray(result, numpy_dtype(spec))
        for spec, result in zip(plan.outputs, results, strict=True)
    }
