"""ONNX Runtime behind the Engine protocol."""

__all__ = ["OrtEngine"]

import mmap
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from sdxl_trt.engines.base import Array, check_inputs
from sdxl_trt.engines.bundle import Bundle, Component
from sdxl_trt.engines.digests import verify_file
from sdxl_trt.engines.errors import (
    EngineError,
    IncompatibleError,
    ResourceError,
    SdxlTrtError,
    explain_os_error,
)

# Errors reach us as exceptions; printed as well, they would stand beside our one line.
_FATAL_ONLY = 4


class OrtEngine:
    """One component on ONNX Runtime's CPU provider.

    The graph is handed over as bytes and the weights as a mapping of the one file that the manifest vouches for:
    ONNX Runtime opens no file by itself, so a graph cannot name another one.
    """

    def __init__(self, bundle: Bundle, name: str) -> None:
        self.name = name
        self.component: Component = bundle.manifest.components[name]
        if self.component.precision == "bf16":
            raise IncompatibleError(
                f"{bundle.root}: {name} is bf16, which ONNX Runtime's CPU provider cannot run; export it again with"
                " --fp16 (or --fp32), or run it with TensorRT"
            )
        self._graph_path = bundle.path(self.component.graph)
        self._weights_path = bundle.path(self.component.weights)
        self._graph: bytes | None = None
        self._weights: mmap.mmap | None = None
        self._session: Any = None
        self._constants: dict[str, Array] = {}

    def prefetch(self) -> None:
        """Map the files and check their digests; see Engine.prefetch."""
        if self._graph is not None or self._session is not None:
            return
        verify_file(self._graph_path, self.component.graph)
        verify_file(self._weights_path, self.component.weights)
        try:
            graph = self._graph_path.read_bytes()
            with self._weights_path.open("rb") as file:
                self._weights = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as exc:
            reason = exc if isinstance(exc, OSError) else OSError(str(exc))
            raise explain_os_error(reason, f"reading component {self.name}") from exc
        self._graph = graph

    def load(self) -> None:
        """Create the session; see Engine.load."""
        if self._session is not None:
            return
        self.prefetch()
        ort = _onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = _FATAL_ONLY
        file_name = PurePosixPath(self.component.weights.file).name
        weights = self._weights
        if weights is not None:
            options.add_external_initializers_from_files_in_memory([file_name], [weights], [len(weights)])
        try:
            self._session = ort.InferenceSession(self._graph, options, providers=["CPUExecutionProvider"])
        except MemoryError as exc:
            raise _out_of_memory(f"loading {self.name}") from exc
        except Exception as exc:
            raise _explain(exc, f"loading {self.name}") from exc
        finally:
            self._forget_files()

    def bind(self, constants: Mapping[str, Array]) -> None:
        """Keep the inputs of a phase; see Engine.bind."""
        self._constants = dict(constants)

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run the session; see Engine.infer."""
        if self._session is None:
            raise EngineError(f"{self.name}: infer before load; call load() first")
        rows = min((array.shape[0] for array in inputs.values() if array.ndim), default=None)
        feed = {name: array[:rows] for name, array in self._constants.items()} | dict(inputs)
        check_inputs(self.component, feed)
        names = list(outputs) if outputs is not None else [spec.name for spec in self.component.outputs]
        try:
            return dict(zip(names, self._session.run(names, feed), strict=True))
        except MemoryError as exc:
            raise _out_of_memory(f"running {self.name}") from exc
        except Exception as exc:
            raise _explain(exc, f"running {self.name}") from exc

    def unload(self) -> None:
        """Free the session; see Engine.unload."""
        self._session = None
        self._constants = {}
        self._forget_files()

    def _forget_files(self) -> None:
        self._graph = None
        if self._weights is not None:
            self._weights.close()
            self._weights = None


def _onnxruntime() -> Any:
    try:
        import onnxruntime  # noqa: PLC0415 - 0.1 s, and only when an engine is loaded
    except ImportError as exc:
        raise IncompatibleError(f"provider ort-cpu needs onnxruntime ({exc}); pip install 'sdxl-trt[cpu]'") from exc
    return onnxruntime


def _explain(exc: Exception, doing: str) -> SdxlTrtError:
    """Map an ONNX Runtime exception: they share no base class, and memory is told apart by the message alone."""
    text = " ".join(str(exc).split())
    if any(sign in text for sign in ("bad_alloc", "Failed to allocate", "bad allocation", "out of memory")):
        return _out_of_memory(doing)
    return EngineError(f"{doing}: ONNX Runtime failed: {text[:300]}; rerun with --debug for the whole of it")


def _out_of_memory(doing: str) -> ResourceError:
    return ResourceError(f"{doing}: out of memory; try --residency swap, a smaller size, or fewer pictures at once")
