"""Look up plans in a bundle: which one fits this machine, and why another does not.

A plan is executable code. It is used only if its bytes match the manifest's digests and its key fits this machine
and the bundle's graphs; nothing is rebuilt silently.
"""

__all__ = ["find_plan", "has_plans", "plan_notes", "planned_components", "preferred_plan", "why_rebuild"]

from collections.abc import Sequence

from sdxl_trt.engines.bundle import (
    ANY,
    BuildFlags,
    Bundle,
    Component,
    Environment,
    Flavour,
    Manifest,
    PlanKey,
    PlanRecord,
    Profile,
    computes_bf16,
)
from sdxl_trt.engines.errors import IncompatibleError
from sdxl_trt.engines.plans.files import rebuild_command
from sdxl_trt.engines.plans.sizes import SUGGESTED_RANK


def has_plans(bundle: Bundle, flavour: Flavour) -> bool:
    """Return whether the bundle has a plan of this flavour, even one that does not fit this machine."""
    return any(record.key.environment.flavour == flavour for record in bundle.manifest.plans)


def find_plan(bundle: Bundle, name: str, environment: Environment, lora_rank: int = 0) -> PlanRecord:
    """Return the plan of component `name` that was built for `environment`.

    With a `lora_rank`, that of a request's LoRAs together, it is the plan that takes LoRAs, of whatever rank: the
    caller compares the two. The command in an error builds it for SUGGESTED_RANK or more. If there is no plan, raises
    IncompatibleError with the differences and the command to type.
    """
    flavour = environment.flavour
    records = [
        record
        for record in bundle.manifest.plans
        if record.key.component == name
        and record.key.environment.flavour == flavour
        and record.for_loras == bool(lora_rank)
    ]
    what = "plan for LoRAs" if lora_rank else "plan"
    built = max((record.key.lora_rank for record in records), default=0)
    wanted = max(built or SUGGESTED_RANK, lora_rank) if lora_rank else 0
    command = rebuild_command(bundle, flavour, wanted)
    if not records:
        raise IncompatibleError(f"{bundle.root}: has no {flavour} {what} of {name}; build it with: {command}")
    component = bundle.manifest.components[name]
    reasons = [why_rebuild(record, component, environment) for record in records]
    fitting = [record for record, differences in zip(records, reasons, strict=True) if not differences]
    if fitting:
        return preferred_plan(fitting, environment)
    nearest = min(reasons, key=len)
    raise IncompatibleError(
        f"{bundle.root}: the {flavour} {what} of {name} does not fit: {'; '.join(nearest)}; build it again with:"
        f" {command}"
    )


def preferred_plan(records: Sequence[PlanRecord], environment: Environment) -> PlanRecord:
    """Return the record to use of those that fit: one built on this GPU before one built on another, then the newest.

    A bundle has one plan per component, flavour and GPU; only hardware-compatible ones fit besides that of this GPU.
    """
    return min(reversed(records), key=lambda record: record.key.environment.gpu != environment.gpu)


def why_rebuild(
    record: PlanRecord,
    component: Component,
    environment: Environment,
    wanted: tuple[tuple[Profile, ...], BuildFlags, int] | None = None,
) -> list[str]:
    """Return the reasons why the plan `record` cannot run `component` in `environment`, one sentence each.

    With `wanted`, the profiles, the flags and the LoRA rank must match too; without it, those of the plan are accepted.
    """
    key, here = record.key, environment
    built, flags = key.environment, key.flags
    reasons = []
    graph = component.planned_graph(key.lora_rank)
    if graph is None or key.graph != graph.sha256:
        reasons.append("the graph was exported again after the plan was built")
    if key.weights != component.weights.sha256:
        reasons.append("the plan was built with other weights")
    if built.flavour != here.flavour:
        reasons.append(f"it is a {built.flavour} plan, {here.flavour} is requested")
    if not _version_fits(built, here, flags):
        reasons.append(f"TensorRT is {here.tensorrt}, the plan was built with {built.tensorrt}")
    reasons += _device_reasons(built, here, flags)
    if _platform(built) != _platform(here):
        reasons.append(f"the platform is {here.platform}, the plan was built on {built.platform}")
    return reasons if wanted is None else reasons + _wishes(key, *wanted)


def _wishes(key: PlanKey, profiles: tuple[Profile, ...], flags: BuildFlags, lora_rank: int) -> list[str]:
    """Return what else is requested than the plan was built for."""
    reasons = []
    if profiles != key.profiles:
        fewer = all(profile in profiles for profile in key.profiles)  # for instance a plan of an older version
        reasons.append("it lacks profiles for some of the requested sizes" if fewer else "other sizes are requested")
    if flags != key.flags:
        reasons.append("other build options are requested")
    if lora_rank != key.lora_rank:
        reasons.append(f"a LoRA rank of {lora_rank} is requested, the plan was built for {key.lora_rank}")
    return reasons


def _platform(environment: Environment) -> str:
    """Return what must be equal: of TensorRT for RTX only the processor, since its plans run on Linux and Windows."""
    if environment.flavour != "tensorrt-rtx":
        return environment.platform
    return environment.platform.rpartition("-")[2].replace("AMD64", "x86_64")


def _version_fits(built: Environment, here: Environment, flags: BuildFlags) -> bool:
    if flags.version_compatible:
        # Version-compatible plans run on their own version and on later minor versions of the same major version.
        return built.tensorrt.split(".")[0] == here.tensorrt.split(".")[0] and _release(built) <= _release(here)
    return built.tensorrt == here.tensorrt


def _release(environment: Environment) -> tuple[int, ...]:
    return tuple(int(part) for part in environment.tensorrt.split(".") if part.isdecimal())


def _device_reasons(built: Environment, here: Environment, flags: BuildFlags) -> list[str]:
    """Return the differences between GPUs that the plan does not allow; see BuildFlags. The driver is none of them."""
    if flags.hardware_compatible:
        older = not computes_bf16(here.compute_capability)  # both came with Ampere
        return [f"the GPU has compute capability {here.compute_capability}, the plan needs 8.0"] if older else []
    pairs = [("compute capability", built.compute_capability, here.compute_capability)]
    if not flags.same_compute_capability:
        pairs.insert(0, ("GPU", built.gpu, here.gpu))
    return [f"the {what} is {now}, the plan was built for {then}" for what, then, now in pairs
            if ANY not in (then, now) and then != now]  # fmt: skip


def plan_notes(record: PlanRecord, here: Environment) -> list[str]:
    """Return the differences between the plan's build and `here` that do not stop the plan, one sentence each."""
    built, notes = record.key.environment, []
    if record.built_with and here.driver not in (ANY, record.built_with):
        notes.append(f"built with NVIDIA driver {record.built_with}, here is {here.driver}")
    pair = (built.compute_capability, here.compute_capability)
    if record.key.flags.hardware_compatible and ANY not in pair and pair[0] != pair[1]:
        notes.append(f"built for every GPU since Ampere on compute capability {pair[0]}, here is {pair[1]}")
    return notes


def planned_components(manifest: Manifest, capability: str | None = None) -> list[str]:
    """Return the components that TensorRT runs: of an autoencoder and its bf16 twin only one.

    That is the twin, except on a GPU whose compute `capability` has no bf16. None: an unknown GPU.
    """
    vaes = [stage.vae for stage in manifest.stages().values()]
    pairs = [(vae.decoder, vae.decoder_bf16) for vae in vaes] + [(vae.encoder, vae.encoder_bf16) for vae in vaes]
    twins = {original: twin for original, twin in pairs if original and twin}
    unused = set(twins) if computes_bf16(capability) else set(twins.values())
    return [name for name in manifest.components if name not in unused]
