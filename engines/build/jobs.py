"""The plans that a bundle needs for an environment: which to keep and which to build."""

__all__ = ["PlanJob", "plan_builds"]

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from sdxl_trt.engines.bundle import (
    ANY,
    BuildFlags,
    Bundle,
    Environment,
    PlanKey,
    PlanRecord,
    computes,
    computes_bf16,
    needed_capability,
    verify_file,
)
from sdxl_trt.engines.errors import (
    IncompatibleError,
    SdxlTrtError,
    UsageError,
)
from sdxl_trt.engines.plans import ADAPTED, Sizes, check_for, planned_components, profiles_of, stage_sizes, why_rebuild


@dataclass(frozen=True)
class PlanJob:
    """The plan of one component: to be built with `key`, or kept if `record` is set, whose key `key` then is."""

    component: str
    key: PlanKey
    record: PlanRecord | None
    reasons: tuple[str, ...] = ()
    """Why the existing plan is not kept."""


def plan_builds(
    bundle: Bundle,
    environment: Environment,
    sizes: Sizes | None = None,
    flags: BuildFlags | None = None,
    *,
    components: Iterable[str] | None = None,
    force: bool = False,
    lora_rank: int = 0,
) -> list[PlanJob]:
    """Return the jobs of building plans for `environment`, one per component; nothing is built.

    With a `lora_rank`, UNets and text encoders have a second job: a plan for LoRAs whose ranks sum up to `lora_rank` at
    most. `components` selects some, a UNet with its shallow one. An existing plan is kept if `why_rebuild` has nothing
    against it and its digest matches, unless `force`. Raises UsageError for an unknown component, SizeError for sizes
    that the UNets do not accept, IncompatibleError for components in bf16, int8 or fp8 or plans for Ampere on a GPU
    that is too old for them, and for plans for LoRAs of a bundle that an older version exported.
    """
    sizes, flags = sizes or stage_sizes(bundle.manifest), flags or BuildFlags()
    check_for(bundle.manifest, sizes)
    names = planned_components(bundle.manifest, environment.compute_capability)
    chosen = list(names if components is None else components)
    chosen += [stage.shallow for stage in bundle.manifest.stages().values() if stage.shallow and stage.unet in chosen]
    unknown = [name for name in chosen if name not in bundle.manifest.components]
    if unknown:
        raise UsageError(f"--components {','.join(unknown)}: the bundle has {', '.join(names)}")
    wanted = [name for name in names if name in chosen]
    _require_kernels(bundle, wanted, environment)
    if flags.hardware_compatible and not computes_bf16(environment.compute_capability):  # both came with Ampere
        raise IncompatibleError(f"--hardware-compatible ampere: {environment.gpu} has compute capability"
                                f" {environment.compute_capability}, such plans are built on 8.0 or later; use"
                                " --hardware-compatible same")  # fmt: skip
    if flags.hardware_compatible:
        _require_kernels_of_ampere(bundle, wanted)
    if lora_rank:
        _require_slots(bundle, wanted)
    return [
        _job(bundle, name, environment, sizes, flags, rank, force=force)
        for name in wanted
        for rank in ((0, lora_rank) if lora_rank and _takes_loras(bundle, name) else (0,))
    ]


def _takes_loras(bundle: Bundle, name: str) -> bool:
    return bundle.manifest.components[name].kind in ADAPTED


def _require_slots(bundle: Bundle, names: Iterable[str]) -> None:
    bare = [name for name in names if _takes_loras(bundle, name)
            and bundle.manifest.components[name].slot_graph is None]  # fmt: skip
    if bare:
        raise IncompatibleError(f"--lora-rank: {bundle.root} was exported by an older version, without graphs that take"
                                f" LoRAs ({', '.join(bare)} has none); export it again with --base")  # fmt: skip


def _require_kernels(bundle: Bundle, names: Sequence[str], environment: Environment) -> None:
    """Raise IncompatibleError for a precision that the GPU cannot compute, and name all components that have it."""
    components, here = bundle.manifest.components, environment.compute_capability
    precision = next((components[name].precision for name in names if not computes(components[name].precision, here)),
                     None)  # fmt: skip
    if precision is None:
        return
    same = [name for name in names if components[name].precision == precision]
    option = "--fp16" if any(components[name].kind == "unet" for name in same) else "--vae-precision fp32"
    if precision == "fp8" and computes("int8", here):
        option = "--int8 or --fp16"
    raise IncompatibleError(f"{bundle.root}: {', '.join(same)} in {precision}, which {environment.gpu} (compute"
                            f" capability {here}) cannot compute, {needed_capability(precision)} is needed; export"
                            f" again with {option}")  # fmt: skip


def _require_kernels_of_ampere(bundle: Bundle, names: Iterable[str]) -> None:
    """Raise IncompatibleError for a precision that plans for every GPU since Ampere cannot have."""
    newer = [name for name in names if not computes(bundle.manifest.components[name].precision, "8.0")]
    if newer:
        raise IncompatibleError(f"--hardware-compatible ampere: {', '.join(newer)} in fp8, which GPUs before compute"
                                " capability 8.9 cannot compute; use --hardware-compatible same")  # fmt: skip


def _job(
    bundle: Bundle,
    name: str,
    environment: Environment,
    sizes: Sizes,
    flags: BuildFlags,
    lora_rank: int,
    *,
    force: bool,
) -> PlanJob:
    component = bundle.manifest.components[name]
    graph = component.planned_graph(lora_rank) or component.graph
    profiles = profiles_of(component, sizes, bundle.manifest.base.vae.factor)
    key = PlanKey(
        component=name,
        graph=graph.sha256,
        weights=component.weights.sha256,
        environment=msgspec.structs.replace(environment, driver=ANY),  # no plan depends on it
        profiles=profiles,
        flags=flags,
        lora_rank=lora_rank,
    )
    wanted = (profiles, flags, lora_rank)
    same = [record for record in bundle.manifest.plans
            if record.key.component == name and record.for_loras == bool(lora_rank)]  # fmt: skip
    for record in same:
        fits = not why_rebuild(record, component, environment, wanted)
        if fits and not force and _is_sound(bundle, record):
            return PlanJob(name, record.key, record)
    there = [record for record in same if _place(record.key) == _place(key)]
    reasons = why_rebuild(there[0], component, environment, wanted) if there else []
    return PlanJob(name, key, None, tuple(reasons))


def _place(key: PlanKey) -> tuple[str, str, str, bool]:
    """Return (component, flavour, GPU, whether it takes LoRAs): a bundle has one plan for each."""
    return key.component, key.environment.flavour, key.environment.gpu, bool(key.lora_rank)


def _is_sound(bundle: Bundle, record: PlanRecord) -> bool:
    try:
        verify_file(bundle.path(record.file), record.file)
    except SdxlTrtError:
        return False
    return True
