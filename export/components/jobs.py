"""What to do with each component: export it, keep the target bundle's, or resume an interrupted export's."""

__all__ = ["ExportJob", "plan_jobs"]

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.bundle import Bundle
from sdxl_trt.export.components.components import ComponentPlan
from sdxl_trt.export.components.convert import component_key, component_source, finished, kept_config
from sdxl_trt.export.components.options import Options
from sdxl_trt.export.components.shallow import SHALLOW, Exported
from sdxl_trt.export.output import is_whole, partial_folder, sound_component


@dataclass(frozen=True)
class ExportJob:
    """One component to "export", "resume" or "keep" (`action`); the latter two have what exists in `found`."""

    plan: ComponentPlan
    key: str
    action: str
    found: Exported | None = None

    @property
    def bytes(self) -> int:
        """Approximate bytes of weights to write; of an 8-bit component, also those it is measured with."""
        if self.action != "export":
            return 0
        return self.plan.bytes() + (self.plan.in_floats().bytes() if self.plan.eight_bit else 0)


def plan_jobs(
    components: Mapping[str, ComponentPlan], previous: Bundle | None, out: Path, options: Options
) -> dict[str, ExportJob]:
    """Return {name: job} of every component.

    With `options.components`, all others are kept from `previous`. Raises UsageError if a kept one is of another model,
    if a complete bundle would become incomplete, since it has no component that the sources have and that is not to be
    exported, and for a name that the model does not have; CorruptError if a kept component is damaged.
    """
    wanted = frozenset(components) if options.components is None else options.components
    _check_names(wanted, components, previous)
    jobs: dict[str, ExportJob] = {}
    for name, plan in components.items():
        if name in wanted:
            jobs[name] = _job(name, plan, previous, out, options)
        elif previous is not None and name in previous.manifest.components:
            jobs[name] = _kept(name, plan, previous)
    if previous is not None:
        _check_whole(wanted, components, previous)
    return jobs


def _check_names(wanted: frozenset[str], components: Mapping[str, ComponentPlan], previous: Bundle | None) -> None:
    unknown = sorted(wanted - components.keys())
    if unknown:
        raise UsageError(f"--components {','.join(unknown)}: this model has no such component, or the refiner shares"
                         f" the base's; choose from {', '.join(components)}")  # fmt: skip
    if previous is None or wanted == components.keys():
        return
    known = {*components, *(name + SHALLOW for name, plan in components.items() if plan.kind == "unet")}
    dropped = sorted(previous.manifest.components.keys() - known)
    if dropped:
        raise UsageError(f"--components: the bundle at {previous.root} also has {', '.join(dropped)}, which these"
                         " sources lack; name the same sources, or export everything")  # fmt: skip


def _check_whole(wanted: frozenset[str], components: Mapping[str, ComponentPlan], previous: Bundle) -> None:
    """Raise UsageError if a complete bundle would become incomplete: nothing is lost, but it never had a component."""
    missing = sorted(components.keys() - wanted - previous.manifest.components.keys())
    if missing and is_whole(previous):
        listed = ",".join(name for name in components if name in wanted or name in missing)
        raise UsageError(f"--components: the bundle at {previous.root} was exported without {', '.join(missing)}, which"
                         f" these sources have; list {'it' if len(missing) == 1 else 'them'} too: --components"
                         f" {listed}")  # fmt: skip


def _kept(name: str, plan: ComponentPlan, previous: Bundle) -> ExportJob:
    existing = _exported(previous, name)
    if existing is None:
        raise RuntimeError(f"{name}: is not in {previous.root}")
    component = existing.component
    if component.source.sha256 != plan.digest:
        raise UsageError(f"--components: {name} in {previous.root} comes from another model or has other LoRAs; list"
                         " it too, or export everything")  # fmt: skip
    for each in existing.records(name).values():
        sound_component(previous, each)
    floats = component.float_precision if component.eight_bit else None
    return ExportJob(plan.revised(precision=component.precision, floats=floats), component.key, "keep", existing)


def _job(name: str, plan: ComponentPlan, previous: Bundle | None, out: Path, options: Options) -> ExportJob:
    key = component_key(plan, options.opset)
    measured = plan.eight_bit and options.calibration is not None and options.calibration.tells
    if options.force or measured:  # what is to be told is known only after measuring again
        return ExportJob(plan, key, "export")
    for action, found in (
        ("keep", _unchanged(previous, name, key)),
        ("resume", finished(partial_folder(out), name, key)),
    ):
        if found is not None:
            # The key covers the computation; the source, and config entries only the host reads, may have changed.
            return ExportJob(plan, key, action, found.of(component_source(plan), kept_config(plan)))
    return ExportJob(plan, key, "export")


def _unchanged(previous: Bundle | None, name: str, key: str) -> Exported | None:
    found = None if previous is None else _exported(previous, name)
    if previous is None or found is None or found.component.key != key:
        return None
    sound = all(sound_component(previous, each, required=False) for each in found.records(name).values())
    return found if sound else None


def _exported(previous: Bundle, name: str) -> Exported | None:
    """Return the component `name` of a bundle, with its shallow one; None if it has no such component."""
    components = previous.manifest.components
    if name not in components:
        return None
    return Exported(component=components[name], shallow=components.get(name + SHALLOW))
