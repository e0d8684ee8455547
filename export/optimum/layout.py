"""A bundle as two folders, base and refiner, that optimum-onnx's SDXL pipelines load.

Each folder is self-contained: ONNX Runtime refuses weights behind links or ``..``, so components shared by base and
refiner are written twice, with the kernel's copy if the file system supports it.
"""

__all__ = ["write_optimum"]

import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import onnx_ir as ir

from sdxl_trt.engines import CorruptError, IncompatibleError, explain_os_error
from sdxl_trt.engines.bundle import MANIFEST, Bundle, Manifest
from sdxl_trt.export.optimum.configs import (
    component_config,
    model_index,
    roles,
    scheduler_config,
    tokenizer_files,
    tokenizer_roles,
)
from sdxl_trt.export.optimum.graphs import wrap
from sdxl_trt.export.output import OPTIMUM_FORMAT, check_target, publish, staged_folder
from sdxl_trt.export.sources import PipelineSource

FORMAT_VERSION = 1
_COPY_CHUNK = 1 << 30
# Errors of kernels and file systems that do not support copy_file_range.
_NO_COPY_RANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EXDEV)
Progress = Callable[[str, str], None]


def write_optimum(
    bundle: Bundle,
    base: PipelineSource,
    refiner: PipelineSource | None,
    out: Path,
    *,
    consume: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write ``out/base`` and, if the bundle has a refiner, ``out/refiner`` in optimum-onnx's layout.

    `base` and `refiner` are the sources that `bundle` was exported from; their scheduler configs are written whole.
    `out` is created or replaced only after everything is written. With `consume` each weight file is moved on its last
    use, which destroys the bundle even if an error follows: for a bundle made only for this call. Memory does not grow
    with the model. Raises UsageError for a target that is not an export, IncompatibleError for bf16, CorruptError for
    damaged files, ResourceError for a full disk.
    """
    check_target(out)
    _check_precisions(bundle.manifest)
    sources = {"base": base, "refiner": refiner or base}
    left = _uses(bundle.manifest) if consume else Counter()
    with staged_folder(out) as folder:
        writer = _Writer(bundle, left, progress or _silent)
        try:
            for name in bundle.manifest.stages():
                writer.stage(name, sources[name], folder / name)
            _write_json(folder / MANIFEST, _marker(bundle.manifest))
        except OSError as exc:
            raise explain_os_error(exc, f"writing {out}") from exc
        publish(folder, out)


def _silent(component: str, stage: str) -> None:
    """Report nothing."""


def _check_precisions(manifest: Manifest) -> None:
    for name, component in manifest.components.items():
        if str(component.precision) == "bf16":
            raise IncompatibleError(
                f"--layout optimum: {name} is bf16, which ONNX Runtime cannot be fed from numpy; export with --fp16"
            )


def _uses(manifest: Manifest) -> Counter[str]:
    """Return how many stages use each component."""
    return Counter(name for stage in manifest.stages().values() for name in roles(stage).values())


def _marker(manifest: Manifest) -> dict[str, Any]:
    """Return the content that marks the folder as an export, which may be replaced, with the weights' note."""
    marker = {"format": OPTIMUM_FORMAT, "format_version": FORMAT_VERSION, "generator": manifest.generator}
    return marker | ({"note": manifest.note} if manifest.note else {})


@dataclass(frozen=True)
class _Writer:
    """Writes stages of `bundle`; `left` counts the remaining uses of components, which are moved on the last."""

    bundle: Bundle
    left: Counter[str]
    progress: Progress

    def stage(self, name: str, source: PipelineSource, folder: Path) -> None:
        """Write the pipeline folder of one stage."""
        manifest = self.bundle.manifest
        stage, scheduler = manifest.stages()[name], scheduler_config(source)
        for role, component in roles(stage).items():
            self.progress(component, f"writing {name}/{role}")
            self._component(component, folder / role)
            _write_json(folder / role / "config.json", component_config(role, manifest.components[component], stage))
        for role, tokenizer in tokenizer_roles(stage).items():
            record = manifest.tokenizers[tokenizer]
            (folder / role).mkdir()
            for file, text in tokenizer_files(self.bundle.path(record.file), record).items():
                (folder / role / file).write_text(text, encoding="utf-8")
        (folder / "scheduler").mkdir()
        _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
        _write_json(folder / "model_index.json", model_index(name, manifest, scheduler))

    def _component(self, name: str, folder: Path) -> None:
        component = self.bundle.manifest.components[name]
        weights = self.bundle.path(component.weights)
        folder.mkdir(parents=True)
        _save_wrapped(self.bundle.path(component.graph), weights.name, folder)
        _place(weights, folder / weights.name, move=self.left[name] == 1)
        self.left[name] -= 1


def _save_wrapped(graph: Path, weights: str, folder: Path) -> None:
    try:
        model = ir.load(graph)
    except OSError:
        raise
    except Exception as exc:  # protobuf's and onnx_ir's exceptions have no common base
        raise CorruptError(f"{graph}: not an ONNX graph ({exc}); run export-engines again") from exc
    stored = [value.const_value for value in model.graph.initializers.values()]
    strays = {str(tensor.location) for tensor in stored if isinstance(tensor, ir.ExternalTensor)} - {weights}
    if strays:
        raise CorruptError(f"{graph}: has weights in {min(strays)!r}, expected {weights}; run export-engines again")
    wrap(model)
    ir.save(model, folder / graph.name)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _place(source: Path, target: Path, *, move: bool) -> None:
    """Copy or move a file; a move across file systems is a copy."""
    if move:
        shutil.move(source, target)
        return
    with source.open("rb") as read, target.open("wb") as write:
        if not _copy_in_kernel(read, write):
            shutil.copyfileobj(read, write, 1 << 22)


def _copy_in_kernel(read: BinaryIO, write: BinaryIO) -> bool:
    """Let the kernel copy, by reference if the file system can; return whether it copied the whole file."""
    if not hasattr(os, "copy_file_range"):
        return False
    try:
        while os.copy_file_range(read.fileno(), write.fileno(), _COPY_CHUNK):
            pass
    except OSError as exc:
        if exc.errno not in _NO_COPY_RANGE:
            raise
    # Both descriptors have advanced past the copied part, so the caller can continue from there.
    return os.fstat(read.fileno()).st_size == os.fstat(write.fileno()).st_size
