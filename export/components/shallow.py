"""The shallow component of a UNet: graphs beside the full ones, over the same weights, and its record."""

__all__ = ["SHALLOW", "SHALLOW_FILES", "Exported", "ShallowFiles"]

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import onnx_ir as ir

from sdxl_trt.engines import explain_os_error
from sdxl_trt.engines.bundle import (
    AdapterTable,
    Component,
    FileRecord,
    Precision,
    Record,
    Source,
    TensorRecord,
    TensorSpec,
    is_slot_input,
)
from sdxl_trt.export.components.files import file_record, save_graph, specs
from sdxl_trt.export.graph import cut_shallow

SHALLOW = "_shallow"
"""What follows a UNet's name in its shallow component's."""
_GRAPH, _CPU_GRAPH, _SLOT_GRAPH, _TABLE = SHALLOW_FILES = (
    "shallow.onnx", "shallow_cpu.onnx", "shallow_adapters.onnx", "shallow_adapters.json",
)  # fmt: skip
"""The files of a shallow component in its UNet's folder; the weights are the UNet's."""
_INSIDE = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


class Exported(Record, frozen=True, kw_only=True):
    """A component as it was exported, and the shallow one over the same weights if it is a UNet that has one."""

    component: Component
    shallow: Component | None = None

    def records(self, name: str) -> dict[str, Component]:
        """Return {name: record} for the manifest; `name` is the component's."""
        return {name: self.component} | ({} if self.shallow is None else {name + SHALLOW: self.shallow})

    def of(self, source: Source, config: dict[str, Any]) -> "Exported":
        """Return the same files with another source and config in their records."""
        shallow = self.shallow and msgspec.structs.replace(self.shallow, source=source, config=config)
        return Exported(
            component=msgspec.structs.replace(self.component, source=source, config=config), shallow=shallow
        )

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """Return the records of all files, each once."""
        both = (*self.component.files, *(() if self.shallow is None else self.shallow.files))
        return tuple(dict.fromkeys(both))


class ShallowFiles:
    """Writes the shallow graphs of one UNet to `folder` of the bundle at `root`, as its full graphs are made.

    `floats` is the precision of what does not compute in 8 bits.
    """

    def __init__(self, root: Path, folder: Path, floats: Precision) -> None:
        self._root, self._folder = root, folder
        self._inside = _INSIDE.get(floats, ir.DataType.FLOAT)
        self._graph: FileRecord | None = None
        self._slot_graph: FileRecord | None = None
        self._cpu_graph: FileRecord | None = None
        self._inputs: tuple[TensorSpec, ...] = ()
        self._outputs: tuple[TensorSpec, ...] = ()
        self._used: frozenset[str] = frozenset()
        self._slots: frozenset[str] = frozenset()

    def add_graph(self, model: ir.Model) -> None:
        """Write what is shallow of the full graph `model`, which stays as it is."""
        cut = model.clone()
        self._graph = self._save(cut, _GRAPH, self._inside)
        self._inputs, self._outputs = map(specs, (cut.graph.inputs, cut.graph.outputs))
        self._used = frozenset(cut.graph.initializers)

    def add_slot_graph(self, model: ir.Model) -> None:
        """Write what is shallow of `model`, which takes LoRAs; it is cut in place."""
        self._slot_graph = self._save(model, _SLOT_GRAPH, self._inside)
        self._slots = frozenset(str(value.name) for value in model.graph.inputs if is_slot_input(str(value.name)))

    def add_cpu_graph(self, model: ir.Model, *, wide: bool = False) -> None:
        """Write what is shallow of `model`, the graph for a CPU; it is cut in place. `wide`: it computes in fp32."""
        self._cpu_graph = self._save(model, _CPU_GRAPH, ir.DataType.FLOAT if wide else self._inside)

    def exported(self, full: Component, table: AdapterTable) -> Exported:
        """Write the table of the graph's tensors; return `full`, whose table is given, with its shallow component.

        The graph does not use the other tensors of the model, so that what changes only those leaves it as it is.
        """
        if self._graph is None:
            raise RuntimeError("the full graph comes first")
        used = [each for each in table.tensors if each.offset is not None and each.name in self._used]
        idle = [msgspec.structs.replace(each, offset=None) for each in table.tensors if each not in used]
        slots = tuple(module for module in table.slots if self._takes(module))
        path = self._folder / _TABLE
        try:
            path.write_bytes(msgspec.json.encode(AdapterTable(tensors=(*used, *idle), slots=slots)))
        except OSError as exc:
            raise explain_os_error(exc, f"writing {path}") from exc
        shallow = msgspec.structs.replace(
            full,
            kind="shallow_unet",
            graph=self._graph,
            cpu_graph=self._cpu_graph,
            slot_graph=self._slot_graph,
            adapters=file_record(self._root, path),
            inputs=self._inputs,
            outputs=self._outputs,
            parameters=_count(used),
            quantization=None,
            ranges=None,
        )
        return Exported(component=full, shallow=shallow)

    def _takes(self, module: str) -> bool:
        return any(name.startswith(f"{module}.lora_") for name in self._slots)

    def _save(self, model: ir.Model, name: str, inside: ir.DataType) -> FileRecord:
        cut_shallow(model, inside)
        path = self._folder / name
        save_graph(model, path)
        return file_record(self._root, path)


def _count(tensors: Iterable[TensorRecord]) -> int:
    """Return the number of parameters."""
    return sum(math.prod(tensor.shape) for tensor in tensors)
