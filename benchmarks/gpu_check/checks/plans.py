"""Checks of plans: libraries, builds, loading, plans over 2 GiB, fused attention, single calls."""

__all__ = ["GROUPS", "bindings", "build", "components", "environment", "fused_attention", "large_plans", "load"]

import math

import numpy as np

from sdxl_trt.benchmarks.gpu_check.checks.calls import call, loaded, stage_of, unet_feed, usual_shape
from sdxl_trt.benchmarks.gpu_check.checks.findings import Finding, Skipped, engine_warnings, finding, require
from sdxl_trt.benchmarks.gpu_check.checks.sampler import MemorySampler, used_memory
from sdxl_trt.benchmarks.gpu_check.checks.workplace import Workplace, require_disk
from sdxl_trt.benchmarks.measure import Figure
from sdxl_trt.engines import IncompatibleError
from sdxl_trt.engines.backends.cuda import cuda_runtime
from sdxl_trt.engines.backends.trt import current_environment, library_version, tensorrt_module
from sdxl_trt.engines.build import build_plans
from sdxl_trt.engines.bundle import Component, Flavour, PlanRecord, read_bundle
from sdxl_trt.engines.host import format_bytes
from sdxl_trt.engines.inspection import compare_engines
from sdxl_trt.engines.residency import open_pool, score_bytes

GROUPS = ("text encoders and autoencoder", "base UNet", "refiner UNet")
LARGE = 2 << 30
LEFT_BEHIND = 64 << 20
HEAD = 64
WHOLE = "the plan is read whole"
"""How the engines' warning begins if TensorRT does not take a plan from a stream reader."""
_OTHERS = GROUPS[0]


def group_of(workplace: Workplace, group: str, flavour: Flavour) -> list[str]:
    """Return the components of one of GROUPS that TensorRT runs. Raises Skipped if the bundle has no refiner."""
    bundle = read_bundle(workplace.root)
    unets = {f"{name} UNet": stage.unet for name, stage in bundle.manifest.stages().items()}
    if group == _OTHERS:
        return [name for name in workplace.components(flavour) if name not in unets.values()]
    if group not in unets:
        raise Skipped("the bundle has no refiner")
    return [unets[group]]


def bindings(flavour: Flavour, _: Workplace) -> Finding:
    """TensorRT and CUDA's bindings can be imported; for TensorRT for RTX, only if it is installed."""
    try:
        trt = tensorrt_module(flavour)
    except IncompatibleError as exc:
        if flavour == "tensorrt-rtx":
            raise Skipped(str(exc)) from exc
        raise
    cuda_runtime()
    return finding(f"TensorRT {library_version(trt)}, cuda-bindings")


def environment(flavour: Flavour, workplace: Workplace) -> Finding:
    """The machine can be described as plans' keys need it."""
    workplace.require_installed(flavour)
    key = current_environment(flavour)
    return finding(f"{key.gpu}, compute capability {key.compute_capability}, driver {key.driver}, {key.platform}")


def build(group: str, flavour: Flavour, workplace: Workplace) -> Finding:
    """Build plans if none fit; existing plans that fit are kept. Each is kept as soon as it is complete."""
    workplace.require_installed(flavour)
    names, how = group_of(workplace, group, flavour), "already built"
    figures: list[Figure] = []
    missing = workplace.missing(flavour, *names)
    if missing:
        require_disk(workplace.root, missing)
        with MemorySampler() as memory:
            build_plans(workplace.root, flavour, flags=workplace.flags, components=names)
        how = "built"
        figures = [Figure("GPU memory while building", float(memory.grown), "B")]
    records = workplace.records(flavour, *names)
    seconds = sum(record.seconds for record in records.values())
    size = sum(record.file.size for record in records.values())
    figures += [Figure("building", seconds, "s"), Figure("plans", float(size), "B")]
    seen = f"{len(records)} plans {how}, {format_bytes(size)}, {seconds:.1f} s of building"
    return require(size, finding(seen, *figures), "they are empty")


def load(flavour: Flavour, workplace: Workplace) -> Finding:
    """Load and unload every plan twice: in pieces, and the second time must leave as much memory free as the first."""
    bundle = workplace.planned(flavour)
    records, used, highest = workplace.records(flavour), [], 0
    with engine_warnings() as warned, open_pool(bundle, flavour, "swap") as pool:
        for _ in range(2):
            for name in records:
                pool.phase(name)
                highest = max(highest, used_memory())
            pool.free()
            used.append(used_memory())
    left = max(used[1] - used[0], 0)
    seen = f"{len(records)} plans; a second load and unload leaves {format_bytes(left)} allocated"
    found = finding(seen, Figure("left allocated", float(left), "B"))
    require(highest > 0, found, "the GPU's memory cannot be read")
    whole = [text for text in warned if WHOLE in text]
    require(not whole, found, f"plans must be loaded in pieces: {next(iter(whole), '')}")
    return require(left <= LEFT_BEHIND, found, f"at most {format_bytes(LEFT_BEHIND)} is expected")


def large_plans(flavour: Flavour, workplace: Workplace) -> Finding:
    """UNet plans of more than 2 GiB load and compute: sizes above 31 bits are handled everywhere."""
    bundle = workplace.planned(flavour)
    records = workplace.records(flavour)
    names = [stage.unet for stage in bundle.manifest.stages().values()]
    large = [name for name in dict.fromkeys(names) if records[name].file.size > LARGE]
    if not large:
        raise Skipped("no plan of a UNet is that large; check a pair of SDXL's size")
    shape = usual_shape(bundle)
    for name in large:
        with loaded(workplace, flavour, name) as engine:
            output = call(engine, unet_feed(engine.component, shape, bundle.manifest.base.vae.factor))
        require(np.isfinite(output).all(), finding(f"{name} computes NaN or infinity"), "finite values are expected")
    sizes = [records[name].file.size for name in large]
    return finding(
        f"{', '.join(f'{name} {format_bytes(size)}' for name, size in zip(large, sizes, strict=True))}",
        Figure("largest plan", float(max(sizes)), "B"),
    )


def fused_attention(stage: str, flavour: Flavour, workplace: Workplace) -> Finding:
    """The UNet's attention is computed by fused kernels, which never hold a layer's scores in memory."""
    bundle = workplace.planned(flavour, stage_of(read_bundle(workplace.root), stage).unet)
    name = stage_of(bundle, stage).unet
    return attention_finding(bundle.manifest.components[name], workplace.records(flavour, name)[name])


def attention_finding(component: Component, record: PlanRecord) -> Finding:
    """Judge a UNet's plan by its activations: without fusion, they would hold the scores of its largest attention.

    The builder states the activations for the largest shapes of any profile, so the scores are those of the largest,
    too. Layer names say less: they depend on the version, and plans are built without verbose layer information.
    Raises Skipped for heads of another width than SDXL's, for which no kernel may exist.
    """
    widths, heads = component.config["block_out_channels"], component.config["attention_head_dim"]
    sizes = {width // count for width, count in zip(widths, heads, strict=True)} if isinstance(heads, list) else {heads}
    if sizes != {HEAD}:
        found = " and ".join(map(str, sorted(sizes)))
        raise Skipped(f"the heads are {found} wide; fused kernels matter at SDXL's {HEAD}")
    # `score_bytes` counts softmax's buffers with half as much again.
    scores = score_bytes(component, record.key.profiles, component.float_precision) * 2 // 3
    activations = record.memory.activations
    seen = f"activations {format_bytes(activations)}; the scores of the largest attention are {format_bytes(scores)}"
    figures = Figure("activations", float(activations), "B"), Figure("scores if not fused", float(scores), "B")
    return require(activations < scores, finding(seen, *figures), "attention is not fused")


def components(group: str, flavour: Flavour, workplace: Workplace) -> Finding:
    """Every output of these components' plans matches ONNX Runtime's, in every profile."""
    names = group_of(workplace, group, flavour)
    bundle, reference = workplace.planned(flavour, *names), workplace.reference()
    found = compare_engines(bundle, names, flavour, reference)
    wrong = [each for each in found if not each.passed]
    worst = min(found, key=lambda each: each.cosine if math.isfinite(each.cosine) else -math.inf)
    said = f"{len(found)} outputs against {reference}; worst {worst.component} {worst.output}: {worst.max_abs:.1e},"
    figure = Figure("lowest cosine", worst.cosine)
    faults = "; ".join(
        f"{each.component} {each.output} differs by {each.max_abs:.1e} ({each.allowed:.1e} allowed), cosine"
        f" {each.cosine:.6f} ({each.required} required)"
        for each in wrong
    )
    return require(not wrong, finding(f"{said} cosine {worst.cosine:.6f}", figure), faults)
