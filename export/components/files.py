"""The files and records that every component of a bundle has: graphs, digests, signatures."""

__all__ = ["file_record", "save_graph", "specs"]

from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir

from sdxl_trt.engines import UsageError, explain_os_error
from sdxl_trt.engines.bundle import DType, FileRecord, TensorSpec
from sdxl_trt.engines.host import sha256_file

_DTYPES: dict[ir.DataType, DType] = {
    ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.INT64: "int64",
}  # fmt: skip


def specs(values: Iterable[ir.Value]) -> tuple[TensorSpec, ...]:
    """Return the manifest's records of a graph's inputs or outputs. Raises UsageError for one without a shape."""
    return tuple(map(_spec, values))


def _spec(value: ir.Value) -> TensorSpec:
    if value.shape is None or value.dtype is None:
        raise UsageError(f"{value.name}: the traced graph states no shape")
    shape = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
    return TensorSpec(name=str(value.name), dtype=_DTYPES[value.dtype], shape=shape)


def file_record(root: Path, path: Path) -> FileRecord:
    """Return the record of a file of the bundle at `root`."""
    return FileRecord(file=path.relative_to(root).as_posix(), size=path.stat().st_size, sha256=sha256_file(path))


def save_graph(model: ir.Model, path: Path) -> None:
    """Write a graph, which refers to its weights. Raises ResourceError for a full disk."""
    model.producer_name, model.producer_version = "sdxl-trt", version("sdxl-trt")
    try:
        ir.save(model, path)
    except OSError as exc:
        raise explain_os_error(exc, f"writing {path}") from exc
