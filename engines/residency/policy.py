"""Choose a residency from what a bundle needs and a device has, before anything is built or loaded.

`resident` keeps both UNets loaded; the refiner is loaded while the base runs. `swap` holds one UNet at a time; while
the base runs, the refiner's plan is read into host memory and checked. `stream` is swap with the UNets' weights above
a budget left in host memory. If not everything fits, text encoders and the autoencoder are freed before UNets.
"""

__all__ = [
    "RESIDENCIES", "can_run", "check_residency", "estimate_memory", "fallbacks", "fit_beside", "optional_components",
    "settled_residency",
]  # fmt: skip

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import get_args

from msgspec.structs import replace

from sdxl_trt.engines.bundle import (
    USUAL_RUN,
    Bundle,
    Manifest,
    PlanRecord,
    Workload,
    read_table,
    run_phases,
    slot_dtype,
)
from sdxl_trt.engines.errors import UsageError
from sdxl_trt.engines.host import available_host_memory, format_bytes
from sdxl_trt.engines.plans import SUGGESTED_RANK, RunSizes, Sizes, default_sizes
from sdxl_trt.engines.residency.estimate import MemoryEstimate, PhaseEstimate, Residency
from sdxl_trt.engines.residency.needs import Extent, Need, need_of, on_device, shares_activations
from sdxl_trt.engines.residency.read_ahead import bytes_ahead

RESIDENCIES: tuple[Residency, ...] = get_args(Residency)
# Usable shares. The rest is for CUDA itself, kernels and the desktop on a device, for the process on a host.
_DEVICE_SHARE, _HOST_SHARE = 0.9, 0.8
# Streamed weights pass through a staging block on the device, this share of all streamable weights.
_STAGED = 0.02


def check_residency(residency: str) -> None:
    """Raise UsageError unless `residency` is "auto" or one of RESIDENCIES."""
    if residency not in ("auto", *RESIDENCIES):
        raise UsageError(f"unknown residency {residency!r}; choose auto, {', '.join(RESIDENCIES[:-1])} or stream")


def settled_residency(residency: str, provider: str, *, once: bool) -> str:
    """Return "swap" for "auto" on a CPU if the process makes a single run (`once`); else `residency` unchanged.

    A single run uses every engine in one phase only, and on a CPU an engine that stays loaded only costs memory.
    """
    return "swap" if once and residency == "auto" and not on_device(provider) else residency


def estimate_memory(
    bundle: Bundle,
    *,
    provider: str,
    capacity: int | None,
    residency: str = "auto",
    sizes: Sizes | None = None,
    records: Mapping[str, PlanRecord] | None = None,
    workload: Workload = USUAL_RUN,
    capability: str | None = None,
    run: RunSizes | None = None,
) -> MemoryEstimate:
    """Return the memory plan for runs of `bundle` on `provider` with `capacity` bytes of device or host memory.

    Nothing is loaded and no GPU is needed. Figures come from `records` (default: the manifest's plans for that
    provider), or are estimated for `sizes` (default: those that plans would be built for; for ONNX Runtime the usual
    ones). They are those of the profiles that `run` uses, by default the usual size with guidance. Components count
    that `workload` uses; `capability` is the GPU's compute capability, None if unknown. On TensorRT, components that
    LoRAs change count with plans for LoRAs and the largest inputs that these take; one without such a plan
    is estimated for the suggested rank. With `residency` "auto", returns the first policy that fits, or the one that
    needs least; `missing` is then its excess. Raises UsageError for an unknown residency, SizeError if a plan does not
    take the sizes of `run`, and what `run_phases` raises.
    """
    check_residency(residency)
    manifest = bundle.manifest
    sizes = sizes or _default_sizes(manifest, provider)
    adapted = workload.adapted
    plans = _recorded(manifest, provider, adapted) if records is None else records
    phases = run_phases(manifest, provider, workload, capability=capability)
    names = tuple(dict.fromkeys(name for used in phases.values() for name in used))
    ranks = {name: record.key.lora_rank for name, record in plans.items() if record.for_loras}
    if shares_activations(provider):
        plans = {name: record for name, record in plans.items() if name not in adapted or record.for_loras}
        ranks = dict.fromkeys(adapted, SUGGESTED_RANK) | ranks
    share = _DEVICE_SHARE if on_device(provider) else _HOST_SHARE

    def draft(at: RunSizes | Extent) -> _Draft:
        needs = {name: need_of(manifest, name, provider, sizes, plans.get(name), at) for name in names}
        needs |= {name: _with_loras(bundle, needs[name], ranks[name]) for name in names if name in ranks}
        return _Draft(
            provider=provider,
            capacity=capacity,
            usable=None if capacity is None else int(capacity * share),
            needs=needs,
            phases=phases,
            unets=tuple(dict.fromkeys(stage.unet for stage in manifest.stages().values())),
            ahead=bytes_ahead((need.weights for need in needs.values()), available_host_memory()),
        )

    asked = draft(run or "usual")
    plan = asked.best() if residency == "auto" else asked.under(residency)
    least, largest = (draft(at).under(plan.residency).peak for at in ("least", "largest"))
    return replace(plan, least_peak=least, largest_peak=largest)


def optional_components(
    plan: MemoryEstimate, manifest: Manifest, estimate: Callable[..., MemoryEstimate]
) -> dict[str, int]:
    """Return the bytes of the components that `plan` lacks and other runs use, {} unless all of both can stay loaded.

    These are the autoencoders' encoders, the shallow UNets and the tiny decoder; ControlNets, which are as large as
    UNets, are not. `estimate` is `estimate_memory` with the arguments of `plan`.
    """
    if plan.residency != "resident" or len(plan.keeps) < len(plan.needs):
        return {}
    stages = manifest.stages()
    cached = tuple(name for name, stage in stages.items() if stage.shallow is not None)
    decoders = (False,) if list(stages.values())[-1].vae.tiny is None else (False, True)
    found: dict[str, int] = {}
    for tiny in decoders:
        wide = estimate(residency="resident", workload=Workload(from_image=True, cached=cached, tiny=tiny))
        known = {need.component for need in plan.needs}
        for need in (need for need in wide.needs if need.component not in known):
            own = 0 if shares_activations(plan.provider) else need.activations
            found[need.component] = need.weights + need.io + own
    return found if fit_beside(plan, found) else {}


def fit_beside(plan: MemoryEstimate, components: Mapping[str, int]) -> bool:
    """Return whether components of so many bytes fit beside what `plan` has loaded at its peak."""
    return plan.usable is None or plan.peak + sum(components.values()) <= plan.usable


def _with_loras(bundle: Bundle, need: Need, rank: int) -> Need:
    """Return `need` with the inputs of LoRAs of the largest `rank` of a plan: those of a request may need less."""
    item = 2 if slot_dtype(bundle.manifest.components[need.component].precision) == "float16" else 4
    slots = read_table(bundle, need.component).slots_by_module.values()
    nbytes = item * rank * sum(slot.columns + slot.outputs for slot in slots)
    return replace(need, io=need.io + nbytes, uncertain=need.uncertain + nbytes)


def fallbacks(plan: MemoryEstimate) -> tuple[Residency, ...]:
    """Return the policies, in order, that need less memory than that of `plan`."""
    streams = any(need.streamable for need in plan.needs)
    smaller = RESIDENCIES[RESIDENCIES.index(plan.residency) + 1 :]
    return tuple(residency for residency in smaller if residency != "stream" or streams)


def _default_sizes(manifest: Manifest, provider: str) -> Sizes:
    """Return the default sizes of plans; for a provider without plans, the model's own size."""
    multiple = math.lcm(*(stage.size_multiple for stage in manifest.stages().values()))
    sizes = default_sizes(manifest.base.sample_size, manifest.base.vae.factor, multiple, manifest.prompt_lengths())
    return sizes if shares_activations(provider) else replace(sizes, static=True)


def _recorded(manifest: Manifest, provider: str, adapted: Collection[str]) -> dict[str, PlanRecord]:
    wanted = [record for record in manifest.plans if record.for_loras == (record.key.component in adapted)]
    records = reversed([record for record in wanted if record.key.environment.flavour == provider])
    return {record.key.component: record for record in records}


@dataclass(frozen=True)
class _Draft:
    """The inputs of every policy: memory, needs and phases; `ahead` is the host memory for plans."""

    provider: str
    capacity: int | None
    usable: int | None
    needs: Mapping[str, Need]
    phases: Mapping[str, tuple[str, ...]]
    unets: tuple[str, ...]
    ahead: int

    def best(self) -> MemoryEstimate:
        """Return the first policy that fits, else the one with the smallest excess."""
        if self.usable is None:
            return self._resident(tuple(self.needs), "the memory is unknown, so all components stay loaded")
        plans = [self.under(residency) for residency in self._policies()]
        chosen = min(plans, key=lambda plan: plan.missing)  # the first of those that fit
        refused = plans[: plans.index(chosen)]
        tried = "".join(f"{plan.residency} would take {format_bytes(plan.peak)}; " for plan in refused)
        return replace(chosen, reason=tried + chosen.reason)

    def under(self, residency: str) -> MemoryEstimate:
        """Return the plan of a policy; `resident` frees the small components only if not everything fits."""
        if residency == "swap":
            return self._plan("swap", "one UNet is loaded at a time")
        if residency == "stream":
            return self._stream()
        everything = self._resident(tuple(self.needs), "all components stay loaded")
        if not everything.missing:
            return everything
        return self._resident(self.unets, "the UNets stay loaded, the rest is loaded for its phase")

    def _policies(self) -> tuple[Residency, ...]:
        return RESIDENCIES if self._streams() else ("resident", "swap")

    def _streams(self) -> bool:
        return any(self.needs[name].streamable for name in self.unets)

    def _resident(self, keeps: tuple[str, ...], reason: str) -> MemoryEstimate:
        return self._plan("resident", reason, keeps=keeps)

    def _stream(self) -> MemoryEstimate:
        if not self._streams():
            why = "the plans were built without it" if shares_activations(self.provider) else "which cannot do it"
            return self._plan("stream", f"as swap: no weight streaming with {self.provider}, {why}")
        budgets = {name: self._budget(self.needs[name]) for name in self.unets}
        left = max(self.needs[name].streamable - budget for name, budget in budgets.items())
        if not left:
            return self._plan("stream", "one UNet is loaded at a time, with all of its weights", budgets=budgets)
        reason = f"one UNet is loaded at a time, up to {format_bytes(left)} of its weights stay in host memory"
        if any(self.needs[name].uncertain for name in self.unets):
            reason += "; build its plan with --weight-streaming"
        return self._plan("stream", reason, budgets=budgets)

    def _budget(self, need: Need) -> int:
        """Return how many streamable bytes may be on the device: all if they fit, else what is free."""
        if self.usable is None:
            return 0
        # A ControlNet is loaded together with the UNet.
        together = [used for used in self.phases.values() if need.component in used]
        free = self.usable - max(self._bytes(used, {}) for used in together)
        if free >= 0:
            return need.streamable
        staged = int(need.streamable * _STAGED)
        return max(need.streamable - staged + free, 0)

    def _plan(
        self, residency: Residency, reason: str, *, keeps: tuple[str, ...] = (), budgets: dict[str, int] | None = None
    ) -> MemoryEstimate:
        budgets = budgets or {}
        phases = tuple(self._phase(name, used, keeps, budgets) for name, used in self.phases.items())
        peak = max(phase.peak for phase in phases)
        return MemoryEstimate(
            provider=self.provider,
            capacity=self.capacity,
            usable=self.usable,
            residency=residency,
            reason=reason,
            needs=tuple(self.needs.values()),
            phases=phases,
            peak=peak,
            keeps=keeps,
            budgets=budgets,
            host=self._host(budgets),
            missing=0 if self.usable is None else max(peak - self.usable, 0),
        )

    def _phase(
        self, name: str, used: tuple[str, ...], keeps: tuple[str, ...], budgets: Mapping[str, int]
    ) -> PhaseEstimate:
        """Return a phase at its peak: what stays loaded, plus the largest of the components that it loads in turn.

        A UNet and its ControlNets are loaded together.
        """
        turns = [used] if any(name in self.unets for name in used) else [(one,) for one in used]
        moments = [tuple(dict.fromkeys((*keeps, *turn))) for turn in turns] or [keeps]
        loaded = max(moments, key=lambda moment: self._bytes(moment, budgets))
        return PhaseEstimate(
            name=name,
            components=used,
            loaded=loaded,
            peak=self._bytes(loaded, budgets),
            uncertain=sum(self.needs[one].uncertain for one in loaded),
        )

    def _bytes(self, loaded: Iterable[str], budgets: Mapping[str, int]) -> int:
        """Return the bytes in use with `loaded` on the device, with one block of activations for all, or one each."""
        needs = [self.needs[name] for name in loaded]
        activations = [need.activations for need in needs]
        together = max(activations, default=0) if shares_activations(self.provider) else sum(activations)
        return sum(_weights(need, budgets) + need.io for need in needs) + together

    def _host(self, budgets: Mapping[str, int]) -> int:
        """Return the host memory for plans: those that are read ahead, and the streamed weights of another."""
        if not shares_activations(self.provider):
            return 0
        return self.ahead + max((self.needs[name].streamable - left for name, left in budgets.items()), default=0)


def _weights(need: Need, budgets: Mapping[str, int]) -> int:
    """Return the bytes of a component's weights on the device, including the staging block for streamed weights."""
    budget = budgets.get(need.component, need.streamable)
    staged = int(need.streamable * _STAGED) if budget < need.streamable else 0
    return need.weights - need.streamable + budget + staged


def can_run(plan: MemoryEstimate, peak: int) -> bool:
    """Return whether a run with this `peak` may fit: only the builder's own figures, not estimates, rule it out."""
    return plan.estimated or plan.capacity is None or peak <= plan.capacity
