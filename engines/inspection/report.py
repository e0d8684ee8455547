"""The report of trt-inspect: a bundle's graphs and plans, what would be rebuilt here, and whether plans are right."""

__all__ = ["InspectionReport", "inspect_bundle"]

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdxl_trt.engines.bundle import (
    ANY,
    OF_LATENTS,
    Bundle,
    Component,
    Environment,
    Manifest,
    PlanRecord,
    axis_root,
    read_bundle,
)
from sdxl_trt.engines.host import mebibytes, one_line, paragraph, span, table
from sdxl_trt.engines.inspection.rebuilds import Rebuilds, file_problem, find_rebuilds
from sdxl_trt.engines.inspection.verification import Verification, verify_plans

Shape = tuple[int, ...]
_DIGITS = 12
_WAYS = {"height": "high", "width": "wide"}


@dataclass(frozen=True)
class InspectionReport:
    """The report as lines for people and as an object for programs; `require` raises if the comparison failed."""

    lines: list[str]
    json: dict[str, Any]
    verification: Verification = field(default_factory=Verification)

    def require(self) -> None:
        """Raise VerificationError if any output differs; the message names every one."""
        self.verification.require()


def inspect_bundle(
    root: Path, *, why_rebuild: bool = False, verify: bool = False, progress: Callable[[str], None] | None = None
) -> InspectionReport:
    """Return the report on the bundle at `root`; works without TensorRT and without a GPU.

    With `why_rebuild`, missing files are reported instead of raised; with `verify`, plans are compared with ONNX
    Runtime, and `progress` receives each component. Raises SourceError, CorruptError or IncompatibleError for an
    invalid bundle, and the errors of the comparison.
    """
    bundle = read_bundle(root, partial=True, files=not why_rebuild)
    lines = [_title(bundle), "", *_graph_lines(bundle), "", *_plan_lines(bundle)]
    data: dict[str, Any] = _json(bundle)
    if why_rebuild:
        rebuilds = find_rebuilds(bundle)
        lines += [line for each in rebuilds for line in ("", *_rebuild_lines(each))]
        data["rebuild"] = [each.json() for each in rebuilds]
    verification = verify_plans(bundle, progress) if verify else Verification()
    if verify:
        lines += ["", *_verification_lines(verification)]
        data["verify"] = verification.json()
    return InspectionReport([*lines, *_ending(bundle.manifest)], data, verification)


def _title(bundle: Bundle) -> str:
    manifest = bundle.manifest
    stages = " and ".join(manifest.stages())
    return f"{bundle.root}: {stages}, {manifest.precision}, made by {one_line(manifest.generator)}"


def _ending(manifest: Manifest) -> Iterator[str]:
    for lora in manifest.loras:
        yield f"LoRA {one_line(lora.name)} at {lora.told}, in the base"
    for net in manifest.controlnets:
        yield f"ControlNet {one_line(net.name)} for the base, in {net.component}"
    if manifest.note:
        yield from ("", *paragraph("note: ", one_line(manifest.note)))


def _graph_lines(bundle: Bundle) -> list[str]:
    manifest = bundle.manifest
    rows = [
        [
            name,
            component.kind,
            component.precision,
            f"{component.parameters / 1e6:.1f} M",
            mebibytes(_size(manifest, name)),
            str(component.opset),
            component.key[:_DIGITS] or "-",
        ]
        for name, component in manifest.components.items()
    ]
    # A shallow UNet's parameters are its UNet's.
    parameters = sum(each.parameters for each in manifest.components.values() if each.kind != "shallow_unet")
    total = sum(_size(manifest, name) for name in manifest.components)
    rows.append(["total", "", "", f"{parameters / 1e6:.1f} M", mebibytes(total), "", ""])
    head = ["graphs", "kind", "precision", "parameters", "size", "opset", "key"]
    lines = table(head, rows, right={3, 4, 5})
    lines += [line for name, component in manifest.components.items() for line in _quantized_lines(name, component)]
    if not manifest.onnx:
        return [*lines, "  (not in this bundle, which contains only plans)"]
    return lines + [f"  {file.file} {problem}" for file in manifest.files if (problem := file_problem(bundle, file))]


def _quantized_lines(name: str, component: Component) -> list[str]:
    """Return what computes in 8 bits and what its ranges were measured on; the names of the rest are in the JSON."""
    found = component.quantization
    if found is None:
        return []
    counts = [(found.linears, "linear layers"), (found.convolutions, "convolutions"), (found.attentions, "attentions")]
    words = ", ".join(f"{count} {what}" for count, what in counts if count)
    said = f"{words} in 8 bits, {len(found.excluded)} excluded layers and the rest in {component.float_precision}"
    return paragraph(f"  {name}: ", f"{said}; calibrated on {one_line(found.calibration)}")


def _size(manifest: Manifest, name: str) -> int:
    return sum(file.size for file in manifest.own_files(name))


def _plan_lines(bundle: Bundle) -> list[str]:
    plans = bundle.manifest.plans
    if not plans:
        return ["plans: none, ONNX Runtime runs the graphs; export-engines --engine tensorrt builds plans"]
    rows = [
        [
            record.key.component + (" for LoRAs" if record.for_loras else ""),
            record.key.environment.flavour,
            mebibytes(record.file.size),
            mebibytes(record.memory.weights),
            mebibytes(record.memory.activations),
            f"{record.seconds:.0f} s",
            record.key.digest()[:_DIGITS],
        ]
        for record in plans
    ]
    head = ["plans", "flavour", "size", "weights", "activations", "built in", "key"]
    first, *each = table(head, rows, right={2, 3, 4, 5})
    return [
        first,
        *(line for row, record in zip(each, plans, strict=True) for line in (row, *_details(bundle, record))),
    ]


def _details(bundle: Bundle, record: PlanRecord) -> Iterator[str]:
    yield from paragraph("      ", "; or ".join(_profiles(bundle, record)))
    yield from paragraph("      ", f"for {_machine(record.environment)}{_flags(record)}")
    problem = file_problem(bundle, record.file)
    if problem:
        yield from paragraph("      ", f"its file {problem}")


def _profiles(bundle: Bundle, record: PlanRecord) -> list[str]:
    """Return the sizes of each profile as text, in pixels instead of latents, and its activations if they are known."""
    component = bundle.manifest.components.get(record.key.component)
    if component is None:
        return ["its component is not in the bundle"]
    factor, each = bundle.manifest.base.vae.factor, record.memory.profile_activations
    words = [_words(component, profile.shapes, factor) for profile in record.key.profiles]
    if len(words) == 1 or not each:
        return words
    return [f"{said}: {mebibytes(size)}" for said, size in zip(words, each, strict=True)]


def _words(component: Component, shapes: Mapping[str, tuple[Shape, Shape, Shape]], factor: int) -> str:
    axes = {
        axis: (low, usual, high)
        for spec in component.inputs
        for axis, low, usual, high in zip(spec.shape, *shapes[spec.name], strict=True)
        if isinstance(axis, str) and axis_root(axis) == axis
    }
    pixels = factor if component.kind in (*OF_LATENTS, "vae_decoder") else 1
    sides = {}
    for axis in [axis for axis in _WAYS if axis in axes]:
        low, usual, high = axes.pop(axis)
        sides[axis] = low * pixels, usual * pixels, high * pixels
    if len(set(sides.values())) == 1 < len(sides):
        words = [span(*sides["height"], "pixels a side")]
    else:
        words = [span(*size, f"pixels {_WAYS[axis]}") for axis, size in sides.items()]
    return ", ".join(words + [span(*sizes, axis) for axis, sizes in axes.items()])


def _machine(environment: Environment) -> str:
    library = "TensorRT for RTX" if environment.flavour == "tensorrt-rtx" else "TensorRT"
    parts = [f"{library} {environment.tensorrt}"]
    parts.append("any RTX GPU" if environment.gpu == ANY else f"{environment.gpu} ({environment.compute_capability})")
    if environment.driver != ANY:
        parts.append(f"driver {environment.driver}")
    return one_line(", ".join([*parts, environment.platform]))


def _flags(record: PlanRecord) -> str:
    flags, rank = record.key.flags, record.key.lora_rank
    words = [f"LoRAs of rank up to {rank}"] if rank else []
    words += [f"workspace {mebibytes(flags.workspace)}"] if flags.workspace else []
    if flags.weight_streaming:
        words.append(f"{mebibytes(record.memory.streamable)} of weights may be streamed")
    options = ("version_compatible", "hardware_compatible", "same_compute_capability")
    words += [name.replace("_", " ") for name in options if getattr(flags, name)]
    return "".join(f"; {each}" for each in words)


def _rebuild_lines(rebuilds: Rebuilds) -> list[str]:
    environment = rebuilds.environment
    where = f"here is {_machine(environment)}" if environment else one_line(rebuilds.problem)
    lines = paragraph(f"{rebuilds.flavour}: ", where)
    width = max((len(each.told) for each in rebuilds.components), default=0)
    for each in rebuilds.components:
        note = f" (note: {'; '.join(each.notes)})" if each.notes else ""
        lines += paragraph(f"  {each.told:<{width}}  ", f"{each.verdict}{'; '.join(each.reasons)}{note}")
    return lines


def _verification_lines(verification: Verification) -> list[str]:
    rows = [
        [
            worst.component,
            worst.output if count == 1 else f"{worst.output} (worst of {count})",
            f"{worst.max_abs:.2g}",
            f"{worst.allowed:.2g}",
            f"{worst.mean_abs:.2g}",
            f"{worst.cosine:.7f}",
            "agrees" if worst.passed else "DIFFERS",
        ]
        for worst, count in verification.worst()
    ]
    head = [f"{verification.left} against {verification.right}", "output", "largest error", "allowed", "mean", "cosine"]
    lines = table([*head, ""], rows, right={2, 3, 4, 5})
    for name, reason in verification.skipped.items():
        lines += paragraph(f"  {name}  ", f"not compared: {reason}")
    return lines


def _json(bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    return {
        "bundle": str(bundle.root),
        "generator": manifest.generator,
        "precision": manifest.precision,
        "stages": list(manifest.stages()),
        "onnx": manifest.onnx,
        "graphs": [_graph_json(manifest, name) for name in manifest.components],
        "plans": [_plan_json(bundle, record) for record in manifest.plans],
        "loras": [
            {"name": lora.name, "sha256": lora.sha256, "scale": lora.scale, "text_scale": lora.encoder_scale}
            for lora in manifest.loras
        ],
        "note": manifest.note,
    }


def _graph_json(manifest: Manifest, name: str) -> dict[str, Any]:
    component = manifest.components[name]
    return {
        "component": name,
        "kind": component.kind,
        "precision": component.precision,
        "float_precision": component.float_precision,
        "quantization": component.quantization,
        "parameters": component.parameters,
        "bytes": _size(manifest, name),
        "opset": component.opset,
        "key": component.key,
        "graph": component.graph.sha256,
        "weights": component.weights.sha256,
    }


def _plan_json(bundle: Bundle, record: PlanRecord) -> dict[str, Any]:
    return {
        "component": record.key.component,
        "flavour": record.key.environment.flavour,
        "file": record.file.file,
        "bytes": record.file.size,
        "memory": record.memory,
        "profiles": record.key.profiles,
        "environment": record.environment,
        "flags": record.key.flags,
        "seconds": record.seconds,
        "log": record.log,
        "key": record.key.digest(),
        "lora_rank": record.key.lora_rank,
        "problem": file_problem(bundle, record.file),
    }
