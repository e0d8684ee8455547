"""The plans that a bundle needs for an environment: which to keep and which to build."""

__all__ = ["PlanJob", "plan_builds"]

from collections.abc import Iterable
from dataclasses import dataclass

from sdxl_trt.engines.bundle import BuildFlags, Bundle, Environment, PlanKey, PlanRecord, verify_file
from sdxl_trt.engines.errors import (
    SdxlTrtError,
    UsageError,
)
from sdxl_trt.engines.plans import Sizes, check_for, planned_components, profiles_of, stage_sizes, why_rebuild


@dataclass(frozen=True)
class PlanJob:
    """The plan of one component: to be built with `key`, or kept if `record` is set."""

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

    `components` selects some. An existing plan is kept if its key and digest match, unless `force`. Raises UsageError
    for an unknown component, SizeError for sizes that the UNets do not accept.
    """
    sizes, flags = sizes or stage_sizes(bundle.manifest), flags or BuildFlags()
    check_for(bundle.manifest, sizes)
    names = planned_components(bundle.manifest)
    chosen = names if components is None else list(components)
    unknown = [name for name in chosen if name not in bundle.manifest.components]
    if unknown:
        raise UsageError(f"--components {','.join(unknown)}: the bundle has {', '.join(names)}")
    return [_job(bundle, name, environment, sizes, flags, force=force) for name in names if name in chosen]


def _job(
    bundle: Bundle, name: str, environment: Environment, sizes: Sizes, flags: BuildFlags, *, force: bool
) -> PlanJob:
    component = bundle.manifest.components[name]
    profiles = profiles_of(component, sizes, bundle.manifest.base.vae.factor)
    key = PlanKey(
        component=name,
        graph=component.graph.sha256,
        weights=component.weights.sha256,
        environment=environment,
        profiles=profiles,
        flags=flags,
    )
    there = [record for record in bundle.manifest.plans if _place(record.key) == _place(key)]
    for record in there:
        if record.key == key and not force and _is_sound(bundle, record):
            return PlanJob(name, key, record)
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
