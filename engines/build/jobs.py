"""The plans that a bundle needs for an environment: which to keep and which to build."""

__all__ = ["PlanJob", "plan_builds"]

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from sdxl_trt.engines.bundle import (
    ANY,
    BuildFlags,
    Bundle,
    Environment,
    PlanKey,
    PlanRecord,
    computes_bf16,
    verify_file,
)
from sdxl_trt.engines.errors import (
    IncompatibleError,
    SdxlTrtError,
    UsageError,
)
from sdxl_trt.engines.plans import Sizes, check_for, planned_components, profiles_of, stage_sizes, why_rebuild


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
) -> list[PlanJob]:
    """Return the jobs of building plans for `environment`, one per component; nothing is built.

    `components` selects some. An existing plan is kept if `why_rebuild` has nothing against it and its digest matches,
    unless `force`. Raises UsageError for an unknown component, SizeError for sizes that the UNets do not accept,
    IncompatibleError for bf16 components or plans for Ampere on an older GPU.
    """
    sizes, flags = sizes or stage_sizes(bundle.manifest), flags or BuildFlags()
    check_for(bundle.manifest, sizes)
    names = planned_components(bundle.manifest, environment.compute_capability)
    chosen = names if components is None else list(components)
    unknown = [name for name in chosen if name not in bundle.manifest.components]
    if unknown:
        raise UsageError(f"--components {','.join(unknown)}: the bundle has {', '.join(names)}")
    wanted = [name for name in names if name in chosen]
    _require_bf16(bundle, wanted, environment)
    if flags.hardware_compatible and not computes_bf16(environment.compute_capability):  # both came with Ampere
        raise IncompatibleError(f"--hardware-compatible ampere: {environment.gpu} has compute capability"
                                f" {environment.compute_capability}, such plans are built on 8.0 or later; use"
                                " --hardware-compatible same")  # fmt: skip
    return [_job(bundle, name, environment, sizes, flags, force=force) for name in wanted]


def _require_bf16(bundle: Bundle, names: Iterable[str], environment: Environment) -> None:
    components = bundle.manifest.components
    bf16 = [name for name in names if components[name].precision == "bf16"]
    if not bf16 or computes_bf16(environment.compute_capability):
        return
    option = "--fp16" if any(components[name].kind == "unet" for name in bf16) else "--vae-precision fp32"
    raise IncompatibleError(f"{bundle.root}: {', '.join(bf16)} in bf16, which {environment.gpu} (compute capability"
                            f" {environment.compute_capability}) cannot compute, 8.0 is needed; export again with"
                            f" {option}")  # fmt: skip


def _job(
    bundle: Bundle, name: str, environment: Environment, sizes: Sizes, flags: BuildFlags, *, force: bool
) -> PlanJob:
    component = bundle.manifest.components[name]
    profiles = profiles_of(component, sizes, bundle.manifest.base.vae.factor)
    key = PlanKey(
        component=name,
        graph=component.graph.sha256,
        weights=component.weights.sha256,
        environment=msgspec.structs.replace(environment, driver=ANY),  # no plan depends on it
        profiles=profiles,
        flags=flags,
    )
    for record in bundle.manifest.plans:
        fits = record.key.component == name and not why_rebuild(record, component, environment, (profiles, flags))
        if fits and not force and _is_sound(bundle, record):
            return PlanJob(name, record.key, record)
    there = [record for record in bundle.manifest.plans if _place(record.key) == _place(key)]
    reasons = why_rebuild(there[0], component, environment, (profiles, flags)) if there else []
    return PlanJob(name, key, None, tuple(reasons))


def _place(key: PlanKey) -> tuple[str, str, str]:
    """Return (component, flavour, GPU): a bundle has one plan for each."""
    return key.component, key.environment.flavour, key.environment.gpu


def _is_sound(bundle: Bundle, record: PlanRecord) -> bool:
    try:
        verify_file(bundle.path(record.file), record.file)
    except SdxlTrtError:
        return False
    return True
