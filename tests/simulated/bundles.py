"""Copies of exported bundles with simulated plans, as if export-engines had built them for the simulated device."""

__all__ = ["chunks_of", "make_simulated_bundle"]

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from sdxl_trt.engines.bundle.bundle import MANIFEST, Bundle, read_bundle, write_manifest
from sdxl_trt.engines.bundle.manifest import Component, Manifest, TensorSpec
from sdxl_trt.engines.bundle.plan_record import BuildFlags, Chunks, Environment, PlanKey, PlanMemory, PlanRecord
from sdxl_trt.engines.bundle.profile import Profile, Range
from sdxl_trt.engines.bundle.records import FileRecord
from sdxl_trt.engines.bundle.tensor_table import read_table, slot_dtype
from sdxl_trt.engines.engine import numpy_dtype
from sdxl_trt.engines.plans.files import PLANS, plan_path
from sdxl_trt.engines.plans.sizes import axes_of, component_profiles, default_sizes, rank_range
from simulated.plans import Plan, encode, output_shape, rounded

Activations = Callable[[str, Profile], int]


def make_simulated_bundle(
    device: Any,
    bundle: Path,
    target: Path,
    *,
    activations: Activations | None = None,
    weight_streaming: bool = False,
    environment: Environment | None = None,
    onnx: bool = True,
    chunk: int = 16 << 20,
    lora_rank: int = 0,
    **sizes: Any,
) -> Path:
    """Copy `bundle` to `target`, add a simulated plan for each component, and return `target`.

    `sizes` are fields of Sizes (height, width, batch, tokens: a Range, a number or (min, opt, max); static), by
    default those of the model. Without any, components with a plan in the manifest keep its profiles and memory, the
    real builder's figures. `activations(component, profile)` returns the bytes, by default in proportion to inputs and
    outputs. With `weight_streaming`, nine tenths of the weights can be streamed. The plans' keys have `environment`,
    by default that of `device`. With a `lora_rank`, UNets and text encoders have a second plan, which takes LoRAs, with
    the same figures. Digests are of chunks of `chunk` bytes. With `onnx` false the copy has plans and no
    graphs; `bundle` must not be deleted.
    """
    # Copies, not links: tests damage bundles, and these come from the repository.
    shutil.copytree(bundle, target, ignore=shutil.ignore_patterns(PLANS))
    manifest = read_bundle(bundle).manifest
    environment = environment or device.environment()
    records = []
    for name, component in manifest.components.items():
        files = (bundle / component.graph.file, bundle / component.weights.file)
        device.sources[component.graph.sha256 + component.weights.sha256] = files
        built = next(
            (
                record
                for record in manifest.plans
                if record.key.component == name and not sizes and not record.for_loras
            ),
            None,
        )
        profiles = built.key.profiles if built else _profiles(manifest, component, sizes)
        figures = _figures(name, component, profiles, built, activations)
        memory = built.memory if built else PlanMemory(weights=component.used_bytes, activations=0)
        memory = msgspec.structs.replace(memory, activations=max(figures), profile_activations=figures)
        if weight_streaming and not memory.streamable:
            memory = msgspec.structs.replace(memory, streamable=memory.weights * 9 // 10)
        key = PlanKey(
            component=name, graph=component.graph.sha256, weights=component.weights.sha256, environment=environment,
            profiles=profiles, flags=BuildFlags(weight_streaming=memory.streamable > 0),
        )  # fmt: skip
        plans = [_plan(key, component, figures, memory)]
        keys = [key]
        if lora_rank and component.slot_graph is not None:
            graph = component.slot_graph
            device.sources[graph.sha256 + component.weights.sha256] = (bundle / graph.file, files[1])
            keys.append(msgspec.structs.replace(key, graph=graph.sha256, lora_rank=lora_rank))
            plans.append(_with_slots(_plan(keys[1], component, figures, memory), read_bundle(bundle), lora_rank))
        for each, plan in zip(keys, plans, strict=True):
            content = encode(plan)
            file, chunks = _write(target, each, content), chunks_of(content, chunk)
            records.append(PlanRecord(key=each, file=file, memory=memory, seconds=1.0, chunks=chunks))
        if not onnx:
            (target / component.graph.file).unlink()
            (target / component.weights.file).unlink(missing_ok=True)  # a shallow UNet shares its UNet's
    write_manifest(target, msgspec.structs.replace(manifest, plans=tuple(records), onnx=onnx))
    # Plans that others can write are refused, and a checkout may be writable by a group.
    target.chmod(0o755)
    (target / MANIFEST).chmod(0o644)
    return target


def chunks_of(content: bytes, size: int) -> Chunks:
    """Return the digests of the chunks of `content` of `size` bytes."""
    parts = [content[start : start + size] for start in range(0, len(content), size)]
    return Chunks(size=size, sha256=tuple(hashlib.sha256(part).hexdigest() for part in parts))


def _plan(key: PlanKey, component: Component, figures: tuple[int, ...], memory: PlanMemory) -> Plan:
    return Plan(
        component=key.component, graph=key.graph, weights=key.weights, inputs=component.inputs,
        outputs=component.outputs, profiles=key.profiles, activations=figures, weights_bytes=memory.weights,
        streamable=memory.streamable, environment=key.environment,
    )  # fmt: skip


def _with_slots(plan: Plan, bundle: Bundle, lora_rank: int) -> Plan:
    """Return `plan` with the inputs of its component's slots, and their shapes in every profile."""
    dtype = slot_dtype(bundle.manifest.components[plan.component].precision)
    slots = read_table(bundle, plan.component).slots_by_module.values()
    specs = tuple(
        TensorSpec(name=name, dtype=dtype, shape=shape) for slot in slots for name, shape in slot.shapes().items()
    )
    ranks = rank_range(lora_rank)
    low, usual, high = (
        {name: shape for slot in slots for name, shape in slot.sizes(rank).items()}
        for rank in (ranks.min, ranks.opt, ranks.max)
    )
    shapes = {name: (low[name], usual[name], high[name]) for name in low}
    profiles = tuple(Profile(shapes=profile.shapes | shapes) for profile in plan.profiles)
    return msgspec.structs.replace(plan, inputs=(*plan.inputs, *specs), profiles=profiles)


def _write(root: Path, key: PlanKey, content: bytes) -> FileRecord:
    path = root / plan_path(key)
    path.parent.mkdir(exist_ok=True)
    path.parent.chmod(0o755)
    path.write_bytes(content)
    path.chmod(0o644)
    return FileRecord(file=plan_path(key), size=len(content), sha256=hashlib.sha256(content).hexdigest())


def _profiles(manifest: Manifest, component: Component, sizes: dict[str, Any]) -> tuple[Profile, ...]:
    base = manifest.base
    multiple = max(stage.size_multiple for stage in manifest.stages().values())
    given = {key: _range(value) for key, value in sizes.items()}
    wanted = msgspec.structs.replace(default_sizes(base.sample_size, base.vae.factor, multiple), **given)
    axes = axes_of(component.kind, component.precision, wanted, base.vae.factor)
    return component_profiles({spec.name: spec.shape for spec in component.inputs}, axes)


def _figures(
    name: str,
    component: Component,
    profiles: tuple[Profile, ...],
    built: PlanRecord | None,
    activations: Activations | None,
) -> tuple[int, ...]:
    """Return the activation bytes of each profile."""
    if activations is None and built is not None:
        return tuple(built.memory.activations_of(index) for index in range(len(profiles)))
    return tuple(
        rounded(activations(name, profile) if activations else _estimate(component, profile)) for profile in profiles
    )


def _range(value: Any) -> Any:
    if isinstance(value, bool | Range):
        return value
    low, usual, high = (value, value, value) if isinstance(value, int) else value
    return Range(min=low, opt=usual, max=high)


def _estimate(component: Component, profile: Profile) -> int:
    """Return eight times the bytes of the largest inputs and outputs: not realistic, but it grows with them."""
    largest = {name: shapes[2] for name, shapes in profile.shapes.items()}
    tensors = [(spec, largest[spec.name]) for spec in component.inputs]
    tensors += [(spec, output_shape(component.inputs, spec, largest)) for spec in component.outputs]
    return 8 * sum(int(np.prod(shape)) * np.dtype(numpy_dtype(spec)).itemsize for spec, shape in tensors)
