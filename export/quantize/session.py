"""Runs a graph that is in memory over the weights of an exported component, on ONNX Runtime's CPU provider."""

__all__ = ["GraphSession"]

import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import onnx_ir as ir

from sdxl_trt.engines import Array, EngineError, explain_os_error
from sdxl_trt.engines.backends.ort import EXACT_PRODUCTS, saturates
from sdxl_trt.engines.host import one_line, return_freed_memory
from sdxl_trt.export.graph import WEIGHTS_FILE

_FATAL_ONLY = 4


class GraphSession:
    """A session of `model`, whose weights lie in ``folder/weights.data``; a context manager.

    `basic` limits ONNX Runtime's optimizations to those that are right for FP8. Raises ResourceError and EngineError.
    """

    def __init__(self, model: ir.Model, folder: Path, *, basic: bool = False) -> None:
        import onnxruntime as ort  # noqa: PLC0415 - 0.1 s, and only when something is measured

        options = ort.SessionOptions()
        options.log_severity_level = _FATAL_ONLY
        if saturates(ort):
            options.add_session_config_entry(EXACT_PRODUCTS, "1")
        if basic:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        try:
            with (folder / WEIGHTS_FILE).open("rb") as file:
                self._weights = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as exc:
            reason = exc if isinstance(exc, OSError) else OSError(str(exc))
            raise explain_os_error(reason, f"reading {folder}") from exc
        options.add_external_initializers_from_files_in_memory([WEIGHTS_FILE], [self._weights], [len(self._weights)])
        graph = ir.to_proto(model).SerializeToString()
        try:
            self._session: Any = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as exc:  # ONNX Runtime's exceptions have no common class
            self._weights.close()
            raise EngineError(f"{folder.name}: ONNX Runtime refuses the graph ({one_line(str(exc))[:300]})") from exc
        return_freed_memory()
        self._dtypes = {value.name: _DTYPES[value.type] for value in self._session.get_inputs()}

    def __enter__(self) -> "GraphSession":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = None
        self._weights.close()
        return_freed_memory()  # the next component's session may be as large

    def run(self, inputs: Mapping[str, Array], names: Sequence[str]) -> dict[str, Array]:
        """Return the outputs `names`; the floating-point ones in fp32. `inputs` are cast to the graph's types."""
        known = {name: value.astype(self._dtypes[name], copy=False) for name, value in inputs.items()}
        try:
            found = self._session.run(list(names), known)
        except Exception as exc:
            raise EngineError(f"ONNX Runtime failed while measuring: {one_line(str(exc))[:300]}") from exc
        return {name: value.astype("float32") if value.dtype == "float16" else value
                for name, value in zip(names, found, strict=True)}  # fmt: skip


_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}
