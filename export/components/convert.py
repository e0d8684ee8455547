"""Convert one component: trace it, simplify the graph, stream the weights; or find the component finished."""

__all__ = [
    "CPU_GRAPH_FILE",
    "GRAPH_FILE",
    "RECORD_FILE",
    "REVISION",
    "SLOT_GRAPH_FILE",
    "component_key",
    "component_source",
    "convert_component",
    "finished",
    "kept_config",
]

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import onnx_ir as ir

from sdxl_trt.engines import SdxlTrtError, explain_os_error
from sdxl_trt.engines.bundle import (
    ADAPTERS_FILE,
    AdapterTable,
    Component,
    FileRecord,
    Kind,
    Source,
    TensorRecord,
    verify_file,
)
from sdxl_trt.engines.host import atomic_write
from sdxl_trt.engines.plans import ADAPTED
from sdxl_trt.export.components.components import ComponentPlan
from sdxl_trt.export.components.files import file_record, save_graph, specs
from sdxl_trt.export.components.progress import ProgressTracker
from sdxl_trt.export.components.shallow import SHALLOW_FILES, Exported, ShallowFiles
from sdxl_trt.export.graph import (
    WEIGHTS_FILE,
    add_residuals,
    add_slots,
    for_cpu,
    make_graph,
    mark_deep,
    merge_upsampling,
    published_name,
    simplify,
    trace_graph,
    write_weights,
)

log = logging.getLogger("sdxl_trt.export")
GRAPH_FILE = "model.onnx"
CPU_GRAPH_FILE = "cpu.onnx"
"""The graph for ONNX Runtime's CPU provider, over the same weights, if a rewritten one is faster there."""
SLOT_GRAPH_FILE = "adapters.onnx"
"""The graph that takes LoRAs as inputs, over the same weights."""
RANGES_FILE = "ranges.json"
"""The measured ranges of an 8-bit component."""
RECORD_FILE = "component.json"
"""Marks a finished component in an unfinished bundle; in the finished one the manifest records the same."""
REVISION = 5
"""Increase it when this code makes other files of the same model."""
# The libraries whose versions determine a graph.
_LIBRARIES = ("sdxl-trt", "torch", "onnxscript", "onnx-ir", "diffusers", "transformers")


def component_key(plan: ComponentPlan, opset: int) -> str:
    """Return a sha256 of all that determines a component's files: model, tensors, options, library versions."""
    settings = [REVISION, opset, plan.time_ids, plan.pooled, plan.digest, _versions(), plan.function()]
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


@cache
def _versions() -> tuple[str, ...]:
    return tuple(version(library) for library in _LIBRARIES)


def finished(root: Path, name: str, key: str) -> Exported | None:
    """Return what an interrupted export finished in ``root/name``; None if damaged or of another key."""
    try:
        found = msgspec.json.decode((root / name / RECORD_FILE).read_bytes(), type=Exported)
        if found.component.key != key:
            return None
        if any(record.file not in _files(name) for record in found.files):
            return None
        for record in found.files:
            verify_file(root / record.file, record)
    except (OSError, msgspec.DecodeError, SdxlTrtError):
        return None
    return found


def convert_component(
    name: str,
    plan: ComponentPlan,
    key: str,
    root: Path,
    opset: int,
    report: ProgressTracker,
    *,
    into: str | None = None,
) -> Exported:
    """Export one component to ``root/into``, by default its name, and return it; its RECORD_FILE is written last.

    A UNet comes with its shallow component; a line says so if it has none.

    Raises CorruptError for weights that are damaged or overflow the precision, ResourceError for a full disk.
    """
    folder = root / (into or name)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    except OSError as exc:
        raise explain_os_error(exc, f"writing {folder}") from exc
    report.stage(name, "tracing")
    where = plan.source.where
    graph = make_graph(
        plan.kind, plan.model, time_ids=plan.time_ids, pooled=plan.pooled, tokens=plan.tokens, where=where
    )
    model = trace_graph(graph, plan.precision, opset)
    if plan.residuals:
        add_residuals(model, plan.kind, plan.model.config, where)
    published = _name_initializers(model, graph.prefix, plan)
    permutations = simplify(model)
    names = {name: source for name, source in published.items() if name in model.graph.initializers}
    report.stage(name, "writing weights")
    written = write_weights(model, plan.checkpoint, names, permutations, folder, report.written)
    report.stage(name, "writing graph")
    shallow = _mark(name, model, plan, root, folder)
    save_graph(model, folder / GRAPH_FILE)
    if shallow is not None:
        shallow.add_graph(model)
    slot_graph, slots = _save_slot_graph(model, plan.kind, root, folder / SLOT_GRAPH_FILE, shallow)
    inputs, outputs = specs(model.graph.inputs), specs(model.graph.outputs)
    cpu_graph = _save_cpu_graph(model, plan, root, folder / CPU_GRAPH_FILE, shallow)
    table = _save_table(plan, written.tensors, slots, folder / ADAPTERS_FILE)
    component = Component(
        kind=plan.kind,
        precision=plan.precision,
        opset=opset,
        graph=file_record(root, folder / GRAPH_FILE),
        weights=FileRecord(file=f"{folder.name}/{WEIGHTS_FILE}", size=written.size, sha256=written.sha256),
        inputs=inputs,
        outputs=outputs,
        source=component_source(plan),
        config=kept_config(plan),
        parameters=written.parameters,
        key=key,
        cpu_graph=cpu_graph,
        slot_graph=slot_graph,
        adapters=file_record(root, folder / ADAPTERS_FILE),
    )
    exported = Exported(component=component) if shallow is None else shallow.exported(component, table)
    with atomic_write(folder / RECORD_FILE) as file:
        file.write(msgspec.json.encode(exported))
    return exported


def component_source(plan: ComponentPlan) -> Source:
    """Return a component's source for the manifest."""
    return Source(name=plan.source.name, class_name=plan.source.class_name, sha256=plan.digest)


def kept_config(plan: ComponentPlan) -> dict[str, Any]:
    """Return the config of a component's model for the manifest, without paths of this machine."""
    return {name: value for name, value in plan.source.config.items() if name != "_name_or_path"}


def _name_initializers(model: ir.Model, prefix: str, plan: ComponentPlan) -> dict[str, str]:
    """Rename weights to their published names, fill the buffers; return {initializer: published name}, both equal."""
    published: dict[str, str] = {}
    for value in list(model.graph.initializers.values()):
        inner = str(value.name).removeprefix(prefix)
        if inner in plan.model.buffers:
            value.const_value = ir.tensor(plan.model.buffers[inner].numpy(), name=str(value.name))
            continue
        name = published_name(inner, plan.source.class_name)
        if name in plan.model.state:
            value.name = name
            published[name] = name
    return published


def _mark(name: str, model: ir.Model, plan: ComponentPlan, root: Path, folder: Path) -> ShallowFiles | None:
    """Let a UNet return what its inner levels pass to the outermost one, for its shallow graphs; None without any."""
    if plan.kind != "unet":
        return None
    outside = model.graph.outputs[0].dtype
    if outside is None or not mark_deep(model, plan.model.state, outside):
        log.warning("%s: has no inner levels that an up block joins, so that it is exported without a shallow UNet, and"
                    " runs cannot cache its steps", name)  # fmt: skip
        return None
    return ShallowFiles(root, folder, plan.precision)


def _save_cpu_graph(
    model: ir.Model, plan: ComponentPlan, root: Path, path: Path, shallow: ShallowFiles | None
) -> FileRecord | None:
    """Rewrite the graph in place for ONNX Runtime's CPU provider and write it; None if nothing was rewritten."""
    if plan.precision == "bf16":  # the CPU provider does not support it
        return None
    # In 8 bits, a convolution of the enlarged picture is faster than a merged one in fp32.
    if not for_cpu(model) + (0 if plan.to_quantize else merge_upsampling(model)):
        return None
    save_graph(model, path)
    if shallow is not None:
        shallow.add_cpu_graph(model)
    return file_record(root, path)


def _save_slot_graph(
    model: ir.Model, kind: Kind, root: Path, path: Path, shallow: ShallowFiles | None
) -> tuple[FileRecord | None, tuple[str, ...]]:
    """Write a copy of the graph that takes LoRAs; return its record and the modules that take them.

    An autoencoder, which no LoRA changes, has neither.
    """
    if kind not in ADAPTED:
        return None, ()
    copy = model.clone()
    slots = add_slots(copy)
    save_graph(copy, path)
    if shallow is not None:
        shallow.add_slot_graph(copy)
    return file_record(root, path), tuple(slot.module for slot in slots)


def _save_table(
    plan: ComponentPlan, written: Sequence[TensorRecord], slots: tuple[str, ...], path: Path
) -> AdapterTable:
    """Write the table of all tensors of the model, also of those that the graph does not use, and of its slots."""
    stored = {record.name for record in written}
    dtype: Any = {"fp16": "float16", "bf16": "bfloat16"}.get(plan.precision, "float32")
    idle = (TensorRecord(name=name, shape=plan.model.state[name], dtype=dtype)
            for name in plan.tensor_names() if name not in stored)  # fmt: skip
    table = AdapterTable(tensors=(*written, *idle), slots=slots)
    try:
        path.write_bytes(msgspec.json.encode(table))
    except OSError as exc:
        raise explain_os_error(exc, f"writing {path}") from exc
    return table


def _files(name: str) -> set[str]:
    files = (GRAPH_FILE, CPU_GRAPH_FILE, SLOT_GRAPH_FILE, WEIGHTS_FILE, ADAPTERS_FILE, RANGES_FILE, *SHALLOW_FILES)
    return {f"{name}/{file}" for file in files}
