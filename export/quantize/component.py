"""One component in 8 bits: from its float graphs, weights and ranges to its files and record."""

__all__ = ["EightBitJob", "quantize_component", "step_psnr"]

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import onnx_ir as ir

from sdxl_trt.engines import explain_os_error
from sdxl_trt.engines.bundle import (
    ADAPTERS_FILE,
    DEEP_FEATURE,
    AdapterTable,
    Component,
    FileRecord,
    Precision,
    Quantization,
)
from sdxl_trt.engines.host import atomic_write
from sdxl_trt.engines.plans import ADAPTED
from sdxl_trt.export.components import (
    CPU_GRAPH_FILE,
    GRAPH_FILE,
    RANGES_FILE,
    RECORD_FILE,
    SLOT_GRAPH_FILE,
    Exported,
    ShallowFiles,
    file_record,
    save_graph,
)
from sdxl_trt.export.eight_bit import (
    EightBitWeights,
    Layer,
    Ranges,
    Scheme,
    attentions_with,
    compute_in_fp32,
    find_layers,
    quantize_for_cpu,
    quantize_for_devices,
    reason_to_exclude,
    refer_to,
    write_eight_bit,
    write_ranges,
)
from sdxl_trt.export.graph import WEIGHTS_FILE, add_slots
from sdxl_trt.export.quantize.session import GraphSession
from sdxl_trt.export.verify import Call, measure


@dataclass(frozen=True, kw_only=True)
class EightBitJob:
    """A component to quantize: its precision and key, its float record and folder, and the ranges of its activations.

    `calibration` says in words how the ranges were measured.
    """

    name: str
    precision: Precision
    key: str
    source: Component
    folder: Path
    ranges: Ranges
    calibration: str

    @property
    def scheme(self) -> Scheme:
        """Return the 8-bit format."""
        return "fp8" if self.precision == "fp8" else "int8"

    def table(self) -> AdapterTable:
        """Return the table of the float component's tensors."""
        return msgspec.json.decode((self.folder / ADAPTERS_FILE).read_bytes(), type=AdapterTable)

    def graph(self, *, cpu: bool = False) -> ir.Model:
        """Return the float graph, for all backends or for ONNX Runtime's CPU provider."""
        record = self.source.cpu_graph if cpu else None
        return ir.load(self.folder / Path((record or self.source.graph).file).name)


def quantize_component(
    job: EightBitJob,
    root: Path,
    excluded: Mapping[str, str],
    written: Callable[[int], None] | None = None,
    *,
    name: str | None = None,
) -> Exported:
    """Write the component to ``root/name`` and return it; its RECORD_FILE is written last.

    `excluded` are patterns of modules that stay in floating point, with a reason each, beside those that always do.
    `name` is by default the component's. Raises ResourceError for a full disk.
    """
    folder = root / (name or job.name)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as exc:
        raise explain_os_error(exc, f"writing {folder}") from exc
    model = job.graph()
    layers = find_layers(model)
    reasons = {layer.module: reason_to_exclude(layer.module, excluded) for layer in layers}
    chosen = {layer.module: layer for layer in layers if reasons[layer.module] is None}
    table = job.table()
    weights = write_eight_bit(table, job.folder, folder, chosen, job.ranges, job.scheme, written)
    attentions = len(attentions_with(model, chosen)) if job.scheme == "fp8" else 0
    _quantize(model, chosen, weights, job, folder)
    save_graph(model, folder / GRAPH_FILE)
    has_shallow = any(spec.name == DEEP_FEATURE for spec in job.source.outputs)
    shallow = ShallowFiles(root, folder, job.source.precision) if has_shallow else None
    if shallow is not None:
        shallow.add_graph(model)
    slot_graph, slots = _save_slot_graph(job, chosen, weights, root, folder, shallow)
    _save_cpu_graph(job, chosen, weights, folder, shallow)
    write_ranges(job.ranges, folder / RANGES_FILE)
    idle = (record for record in table.tensors if record.offset is None)
    table = AdapterTable(tensors=(*weights.written.tensors, *idle), slots=slots)
    component = msgspec.structs.replace(
        job.source,
        precision=job.precision,
        graph=file_record(root, folder / GRAPH_FILE),
        weights=FileRecord(
            file=f"{folder.name}/{WEIGHTS_FILE}", size=weights.written.size, sha256=weights.written.sha256
        ),
        parameters=weights.written.parameters,
        key=job.key,
        cpu_graph=file_record(root, folder / CPU_GRAPH_FILE),
        slot_graph=slot_graph,
        adapters=_save_table(table, root, folder / ADAPTERS_FILE),
        ranges=file_record(root, folder / RANGES_FILE),
        quantization=Quantization(
            calibration=job.calibration,
            ranges=job.ranges.digest(),
            linears=sum(layer.kind == "linear" for layer in chosen.values()),
            convolutions=sum(layer.kind == "convolution" for layer in chosen.values()),
            attentions=attentions,
            excluded={module: reason for module, reason in reasons.items() if reason is not None},
        ),
    )
    exported = Exported(component=component) if shallow is None else shallow.exported(component, table)
    with atomic_write(folder / RECORD_FILE) as file:
        file.write(msgspec.json.encode(exported))
    return exported


def step_psnr(folder: Path, scheme: Scheme, calls: Sequence[Call]) -> float:
    """Return the lowest PSNR, in dB, of the 8-bit component in `folder` against its recorded float calls.

    It is infinite if all are equal, and minus infinity if the component computes NaN or infinity.
    """
    lowest = float("inf")
    with GraphSession(ir.load(folder / CPU_GRAPH_FILE), folder, basic=scheme == "fp8") as session:
        for call in calls:
            found = session.run(call.inputs, list(call.outputs))
            for output, exact in call.outputs.items():
                lowest = min(lowest, measure(output, found[output], exact).rank)
    return lowest


def _quantize(
    model: ir.Model, chosen: Mapping[str, Layer], weights: EightBitWeights, job: EightBitJob, folder: Path,
    *, wide: bool = False,
) -> None:  # fmt: skip
    refer_to(model, weights, folder)
    if wide:
        compute_in_fp32(model)
    layers = [layer for layer in find_layers(model) if layer.module in chosen]
    quantize_for_devices(model, layers, weights, job.ranges, job.scheme, folder, wide=wide)


def _save_slot_graph(
    job: EightBitJob, chosen: Mapping[str, Layer], weights: EightBitWeights, root: Path, folder: Path,
    shallow: ShallowFiles | None,
) -> tuple[FileRecord | None, tuple[str, ...]]:  # fmt: skip
    """Write the graph that takes LoRAs: beside the 8-bit layers, in floating point."""
    if job.source.kind not in ADAPTED:
        return None, ()
    model = job.graph()
    slots = add_slots(model, beside=chosen.keys())
    _quantize(model, chosen, weights, job, folder)
    save_graph(model, folder / SLOT_GRAPH_FILE)
    if shallow is not None:
        shallow.add_slot_graph(model)
    return file_record(root, folder / SLOT_GRAPH_FILE), tuple(slot.module for slot in slots)


def _save_cpu_graph(
    job: EightBitJob, chosen: Mapping[str, Layer], weights: EightBitWeights, folder: Path, shallow: ShallowFiles | None
) -> None:
    """Write the graph for a CPU: in int8 one of its own, in FP8 the same as for devices, computed in fp32."""
    model = job.graph(cpu=job.scheme == "int8")
    if job.scheme == "fp8":
        _quantize(model, chosen, weights, job, folder, wide=True)
    else:
        refer_to(model, weights, folder)
        compute_in_fp32(model)
        layers = [layer for layer in find_layers(model) if layer.module in chosen]
        quantize_for_cpu(model, layers, weights, job.ranges, folder)
    save_graph(model, folder / CPU_GRAPH_FILE)
    if shallow is not None:
        shallow.add_cpu_graph(model, wide=True)


def _save_table(table: AdapterTable, root: Path, path: Path) -> FileRecord:
    try:
        path.write_bytes(msgspec.json.encode(table))
    except OSError as exc:
        raise explain_os_error(exc, f"writing {path}") from exc
    return file_record(root, path)
