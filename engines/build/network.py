"""ONNX graphs as TensorRT networks: parsed, strongly typed, and what TensorRT said of them.

Every function takes the module, ``tensorrt`` or ``tensorrt_rtx``, from whoever imported it (`tensorrt_api`).
"""

__all__ = ["BuildLog", "Parsed", "allow_decomposition", "new_network", "parse_error", "parse_graph"]

import re
import time
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from sdxl_trt.engines.errors import CorruptError, EngineError, ResourceError, SdxlTrtError

_FIGURE = re.compile(r"Total (Activation|Weights) Memory: (\d+)")
_NO_MEMORY = re.compile(r"out ?of ?memory|bad_alloc|cannot allocate memory|MemoryAllocation", re.IGNORECASE)
_POSITION = re.compile(r"^\w+\.cpp:\d+: ")
_WEIGHTS = ("Failed to open file", "ONNX external weights")
_SEVERITIES = ("ERROR", "WARNING", "INFO")


class BuildLog:
    """What TensorRT says: errors are kept, memory figures read, and all but the verbose lines written to `file`.

    `activations` and `weights` are bytes, None before the builder stated them; of several profiles the largest.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self.errors: list[str] = []
        self.activations: int | None = None
        self.weights: int | None = None
        self._file = file

    def note(self, severity: str, message: str) -> None:
        """Take one message; `severity` is the name that TensorRT gives it. A sink for `tensorrt_api.make_logger`."""
        if severity.endswith("ERROR"):
            severity = "ERROR"
            self.errors.append(message)
        for kind, figure in _FIGURE.findall(message):
            self._figure(kind, int(figure))
        if self._file and severity in _SEVERITIES:
            self._file.write(f"[{severity[0]}] {message}\n")

    def _figure(self, kind: str, figure: int) -> None:
        if kind == "Activation":
            self.activations = max(figure, self.activations or 0)
        else:
            self.weights = max(figure, self.weights or 0)

    def failure(self, doing: str, hint: str) -> SdxlTrtError:
        """Return the error for something that came to nothing: of memory if any message speaks of it."""
        for message in self.errors:
            if _NO_MEMORY.search(message):
                return ResourceError(f"{doing}: out of memory ({message.strip()}); close what else uses the device and"
                                     " this machine's memory, or build for smaller sizes")  # fmt: skip
        # The first error is the cause; the last one only says that there was one.
        said = self.errors[0].strip() if self.errors else "TensorRT did not say why"
        return EngineError(f"{doing}: {said}; {hint}")


class Parsed(NamedTuple):
    """A network and how long it took to parse. Its weights are the parser's: keep both until the plan is built."""

    accepted: bool
    network: Any
    parser: Any
    seconds: float


def new_network(trt: Any, builder: Any) -> Any:
    """Return an empty, strongly typed network: the precision of every tensor is the graph's."""
    # Numbered anew in TensorRT 11, and absent where there is no other typing.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return builder.create_network(0 if typed is None else 1 << int(typed))


def parse_graph(trt: Any, builder: Any, logger: Any, graph: Path) -> Parsed:
    """Parse the ONNX file `graph`, external weights included; the parser's errors are for `parse_error`."""
    network = new_network(trt, builder)
    parser = trt.OnnxParser(network, logger)
    started = time.perf_counter()
    accepted = bool(parser.parse_from_file(str(graph)))
    return Parsed(accepted, network, parser, time.perf_counter() - started)


def parse_error(trt: Any, parsed: Parsed, log: BuildLog, graph: Path) -> SdxlTrtError | None:
    """Return what the parser had against `graph`, None if it took it whole; `log` is what it was telling."""
    parser = parsed.parser
    if parsed.accepted and parsed.network.num_outputs:
        return None
    if not parser.num_errors:
        return CorruptError(f"{graph}: has no outputs; run export-engines again")
    error = parser.get_error(0)
    if error.code() == trt.ErrorCode.MODEL_DESERIALIZE_FAILED:
        return CorruptError(f"{graph}: is no ONNX graph ({error.desc()}); run export-engines again")
    reason = f"{error.node_operator()} {error.node_name()}: {error.desc()}".lstrip(": ")
    # Of weights that cannot be read the parser's own error says only which initializer needed them.
    cause = _POSITION.sub("", log.errors[0]) if log.errors else ""
    if cause.startswith(_WEIGHTS):
        reason = cause
    return EngineError(f"{graph}: TensorRT's parser refused it: {' '.join(reason.split())}; run export-engines again")


def allow_decomposition(trt: Any, network: Any) -> None:
    """Let attention fall apart into products and a softmax where no fused kernel takes it.

    The parser makes one layer of ONNX's Attention. TensorRT has kernels for half types and some head widths only,
    and refuses to build the rest (fp32 graphs, odd heads) unless each layer is told that it may be decomposed.
    Where there is a kernel it is used all the same.
    """
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    for i in range(network.num_layers if kind is not None else 0):
        layer = network.get_layer(i)
        if layer.type == kind:
            # The network gives every layer as an ILayer; NVIDIA's own samples narrow it so.
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True
