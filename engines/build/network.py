"""ONNX graphs to TensorRT networks: strongly typed parsing, and the errors and figures in TensorRT's log.

Every function takes the module as `trt`: ``tensorrt`` or ``tensorrt_rtx``, imported by `tensorrt_module`.
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
_LAYERS = "Layers:"


class BuildLog:
    """TensorRT's messages: keeps errors, reads memory figures, and writes all but verbose lines to `file`.

    With `layers` the list of the plan's layers is written too, which TensorRT logs as verbose. `activations` has the
    bytes of each profile, in order, as far as the builder has logged them. `weights` are bytes, None until the builder
    logs them.
    """

    def __init__(self, file: TextIO | None = None, *, layers: bool = False) -> None:
        self.errors: list[str] = []
        self.activations: list[int] = []
        self.weights: int | None = None
        self._file = file
        self._layers = layers

    def note(self, severity: str, message: str) -> None:
        """Take one message; `severity` is TensorRT's name for it. A sink for `make_logger`."""
        if severity.endswith("ERROR"):
            severity = "ERROR"
            self.errors.append(message)
        for kind, figure in _FIGURE.findall(message):
            self._figure(kind, int(figure))
        if self._file and (severity in _SEVERITIES or (self._layers and message.startswith(_LAYERS))):
            self._file.write(f"[{severity[0]}] {message}\n")

    def _figure(self, kind: str, figure: int) -> None:
        if kind == "Activation":
            self.activations.append(figure)
        else:
            self.weights = max(figure, self.weights or 0)

    def failure(self, doing: str, hint: str) -> SdxlTrtError:
        """Return the error for a failure while `doing`: ResourceError if any message is about memory."""
        for message in self.errors:
            if _NO_MEMORY.search(message):
                return ResourceError(f"{doing}: out of memory ({message.strip()}); close other programs that use the"
                                     " GPU or much memory, or build for smaller sizes")  # fmt: skip
        # The first error is the cause; the last one only reports that there was one.
        said = self.errors[0].strip() if self.errors else "TensorRT did not say why"
        return EngineError(f"{doing}: {said}; {hint}")


class Parsed(NamedTuple):
    """A network and its parse time. The parser owns the weights: keep both until the plan is built."""

    accepted: bool
    network: Any
    parser: Any
    seconds: float


def new_network(trt: Any, builder: Any) -> Any:
    """Return an empty, strongly typed network: every tensor keeps the graph's dtype."""
    # The flag has another number in TensorRT 11, and is absent where strong typing is the only mode.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return builder.create_network(0 if typed is None else 1 << int(typed))


def parse_graph(trt: Any, builder: Any, logger: Any, graph: Path) -> Parsed:
    """Parse the ONNX file `graph` with its external weights; `parse_error` returns the parser's errors."""
    network = new_network(trt, builder)
    parser = trt.OnnxParser(network, logger)
    started = time.perf_counter()
    accepted = bool(parser.parse_from_file(str(graph)))
    return Parsed(accepted, network, parser, time.perf_counter() - started)


def parse_error(trt: Any, parsed: Parsed, log: BuildLog, graph: Path) -> SdxlTrtError | None:
    """Return the error for a `graph` that the parser rejected, or None if it parsed; `log` has its messages."""
    parser = parsed.parser
    if parsed.accepted and parsed.network.num_outputs:
        return None
    if not parser.num_errors:
        return CorruptError(f"{graph}: has no outputs; run export-engines again")
    error = parser.get_error(0)
    if error.code() == trt.ErrorCode.MODEL_DESERIALIZE_FAILED:
        return CorruptError(f"{graph}: is not an ONNX graph ({error.desc()}); run export-engines again")
    reason = f"{error.node_operator()} {error.node_name()}: {error.desc()}".lstrip(": ")
    # For unreadable weights the parser's own error names only the initializer; the log has the cause.
    cause = _POSITION.sub("", log.errors[0]) if log.errors else ""
    if cause.startswith(_WEIGHTS):
        reason = cause
    return EngineError(f"{graph}: TensorRT's parser rejected it: {' '.join(reason.split())}; run export-engines again")


def allow_decomposition(trt: Any, network: Any) -> None:
    """Allow attention to be decomposed into products and a softmax if no fused kernel supports it.

    The parser maps ONNX's Attention to one layer. TensorRT has kernels for half precision and some head sizes only,
    and does not build the rest (fp32 graphs, unusual head sizes) unless the layer is marked as decomposable. Layers
    with a fused kernel still use it.
    """
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    for i in range(network.num_layers if kind is not None else 0):
        layer = network.get_layer(i)
        if layer.type == kind:
            # The network returns every layer as an ILayer; NVIDIA's own samples cast it this way.
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True
