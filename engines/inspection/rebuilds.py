"""Which plans of a bundle work on this machine, and why the others do not."""

__all__ = ["Rebuild", "Rebuilds", "file_problem", "find_rebuilds"]

from dataclasses import dataclass, field
from typing import Any, Literal

from sdxl_trt.engines.bundle import Bundle, Environment, FileRecord, Flavour, PlanRecord
from sdxl_trt.engines.errors import SdxlTrtError

Status = Literal["usable", "stale", "missing", "unknown"]
_VERDICTS: dict[Status, str] = {
    "usable": "its plan is used as it is",
    "stale": "would be rebuilt: ",
    "missing": "would be built: it has no plan",
    "unknown": "its plan matches the bundle's graph and weights; whether it fits this machine is unknown",
}


@dataclass(frozen=True)
class Rebuild:
    """What would happen to the plan of one component, and why."""

    component: str
    status: Status
    reasons: list[str]
    notes: list[str] = field(default_factory=list)
    """Differences from the build that do not stop the plan, such as another driver."""
    lora_rank: int = 0
    """The rank of the component's plan for LoRAs, if this is about that plan."""

    @property
    def told(self) -> str:
        """The component, and that this is about its plan for LoRAs."""
        return f"{self.component} for LoRAs" if self.lora_rank else self.component

    @property
    def verdict(self) -> str:
        """What would happen, as the start of a sentence that the reasons complete."""
        return _VERDICTS[self.status]


@dataclass(frozen=True)
class Rebuilds:
    """The plans of one flavour compared with this machine; `problem`: why its environment is unknown, or ""."""

    flavour: Flavour
    environment: Environment | None
    problem: str
    components: list[Rebuild]

    def json(self) -> dict[str, Any]:
        """Return the record as JSON data."""
        return {
            "flavour": self.flavour,
            "environment": self.environment,
            "problem": self.problem,
            "components": [
                {
                    "component": each.component,
                    "status": each.status,
                    "reasons": each.reasons,
                    "notes": each.notes,
                    "lora_rank": each.lora_rank,
                }
                for each in self.components
            ],
        }


def find_rebuilds(bundle: Bundle) -> list[Rebuilds]:
    """Return what a build would change, for every flavour that the bundle has plans of (else TensorRT).

    A missing TensorRT or GPU is not raised but returned as `problem`.
    """
    there = dict.fromkeys(record.key.environment.flavour for record in bundle.manifest.plans)
    flavours: list[Flavour] = list(there) or ["tensorrt"]
    return [_of_flavour(bundle, flavour) for flavour in flavours]


def _of_flavour(bundle: Bundle, flavour: Flavour) -> Rebuilds:
    # Both import CUDA and the builder.
    from sdxl_trt.engines.backends.trt import current_environment  # noqa: PLC0415
    from sdxl_trt.engines.plans import planned_components  # noqa: PLC0415

    environment, problem = None, ""
    try:
        environment = current_environment(flavour)
    except SdxlTrtError as exc:
        problem = str(exc)
    names = planned_components(bundle.manifest, environment.compute_capability if environment else None)
    found = [_of_component(bundle, name, flavour, environment) for name in names]
    # Plans for LoRAs are only built if they are asked for: none is missing.
    found += [_of_component(bundle, record.key.component, flavour, environment, record.key.lora_rank)
              for record in bundle.manifest.plans
              if record.for_loras and record.key.environment.flavour == flavour]  # fmt: skip
    return Rebuilds(flavour, environment, problem, found)


def _of_component(
    bundle: Bundle, name: str, flavour: Flavour, environment: Environment | None, lora_rank: int = 0
) -> Rebuild:
    records = [
        record
        for record in bundle.manifest.plans
        if record.key.component == name
        and record.key.environment.flavour == flavour
        and record.key.lora_rank == lora_rank
    ]
    if not records:
        return Rebuild(name, "missing", [])
    from sdxl_trt.engines.plans import plan_notes, preferred_plan  # noqa: PLC0415

    found = [(_reasons(bundle, record, environment), record) for record in records]
    reasons, _ = min(found, key=lambda each: len(each[0]))
    if reasons:
        return Rebuild(name, "stale", reasons, lora_rank=lora_rank)
    if environment is None:
        return Rebuild(name, "unknown", [], lora_rank=lora_rank)
    record = preferred_plan([record for reasons, record in found if not reasons], environment)
    return Rebuild(name, "usable", [], plan_notes(record, environment), lora_rank)


def _reasons(bundle: Bundle, record: PlanRecord, environment: Environment | None) -> list[str]:
    """Return what is wrong with a plan; without an `environment`, only its file, graph and weights are checked."""
    from sdxl_trt.engines.plans import why_rebuild  # noqa: PLC0415

    component = bundle.manifest.components[record.key.component]
    problem = file_problem(bundle, record.file)
    return [
        *([f"its file {problem}"] if problem else []),
        *why_rebuild(record, component, environment or record.key.environment),
    ]


def file_problem(bundle: Bundle, record: FileRecord) -> str:
    """Return what is wrong with a file ("is missing"), judged by its size alone, or ""."""
    try:
        size = bundle.path(record).stat().st_size
    except OSError:
        return "is missing"
    except SdxlTrtError as exc:
        return f"cannot be used: {exc}"
    return "" if size == record.size else f"has {size} bytes instead of {record.size}"
