"""What is to be done to each component: exported, kept from the bundle at the target, or taken up where it stopped."""

__all__ = ["ExportJob", "plan_jobs"]

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.bundle import Bundle, Component
from sdxl_trt.export.components.components import ComponentPlan, Options
from sdxl_trt.export.components.convert import component_key, component_source, finished, kept_config
from sdxl_trt.export.output import is_whole, partial_folder, sound_component


@dataclass(frozen=True)
class ExportJob:
    """One component: `action` is "export", "resume" or "keep"; the latter two have the `component` that exists."""

    plan: ComponentPlan
    key: str
    action: str
    component: Component | None = None

    @property
    def bytes(self) -> int:
        """About how many bytes of weights have to be written."""
        return self.plan.bytes() if self.action == "export" else 0


def plan_jobs(
    components: Mapping[str, ComponentPlan], previous: Bundle | None, out: Path, options: Options
) -> dict[str, ExportJob]:
    """Return the job of every component, by name.

    With `options.components` the others are kept as `previous` has them, if they are of the same model. Raises
    UsageError where they are not, where one is missing that a whole bundle had, and for a name that the model has not;
    CorruptError for a kept component that is damaged.
    """
    wanted = frozenset(components) if options.components is None else options.components
    _check_names(wanted, components, previous)
    jobs: dict[str, ExportJob] = {}
    for name, plan in components.items():
        if name in wanted:
            jobs[name] = _job(name, plan, previous, out, options)
        elif previous is not None and name in previous.manifest.components:
            jobs[name] = _kept(name, plan, previous)
    return jobs


def _check_names(wanted: frozenset[str], components: Mapping[str, ComponentPlan], previous: Bundle | None) -> None:
    unknown = sorted(wanted - components.keys())
    if unknown:
        raise UsageError(f"--components {','.join(unknown)}: this model has no such component, or the refiner shares"
                         f" the base's; it has {', '.join(components)}")  # fmt: skip
    if previous is None or wanted == components.keys():
        return
    dropped = sorted(previous.manifest.components.keys() - components.keys())
    if dropped:
        raise UsageError(f"--components: the bundle at {previous.root} has {', '.join(dropped)} too, which these"
                         " sources have not; name the same sources, or export everything")  # fmt: skip
    missing = sorted(components.keys() - wanted - previous.manifest.components.keys())
    if missing and is_whole(previous):
        raise UsageError(f"--components: the bundle at {previous.root} would lack {', '.join(missing)}; list that too")


def _kept(name: str, plan: ComponentPlan, previous: Bundle) -> ExportJob:
    component = previous.manifest.components[name]
    if component.source.sha256 != plan.digest:
        raise UsageError(f"--components: {name} in {previous.root} is of another model, or has other LoRAs; list it"
                         " too, or export everything")  # fmt: skip
    sound_component(previous, component)
    return ExportJob(replace(plan, precision=component.precision), component.key, "keep", component)


def _job(name: str, plan: ComponentPlan, previous: Bundle | None, out: Path, options: Options) -> ExportJob:
    key = component_key(plan, options.opset)
    if options.force:
        return ExportJob(plan, key, "export")
    for action, found in (
        ("keep", _unchanged(previous, name, key)),
        ("resume", finished(partial_folder(out), name, key)),
    ):
        if found is not None:
            # The key knows what is computed; where it came from, and what only the host reads, may have changed.
            return ExportJob(plan, key, action, msgspec.structs.replace(
                found, source=component_source(plan), config=kept_config(plan)))  # fmt: skip
    return ExportJob(plan, key, "export")


def _unchanged(previous: Bundle | None, name: str, key: str) -> Component | None:
    component = previous.manifest.components.get(name) if previous else None
    if previous is None or component is None or component.key != key:
        return None
    return component if sound_component(previous, component, required=False) else None
