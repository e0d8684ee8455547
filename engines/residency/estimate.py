"""The memory plan as a record: what stays loaded, what is swapped, what streams, and the peak of every phase."""

__all__ = ["MemoryEstimate", "PhaseEstimate", "Residency"]

from typing import Literal

import msgspec

from sdxl_trt.engines.bundle import Natural, Record
from sdxl_trt.engines.errors import ResourceError
from sdxl_trt.engines.host import format_bytes
from sdxl_trt.engines.residency.needs import Need, on_device

Residency = Literal["resident", "swap", "stream"]


class PhaseEstimate(Record, frozen=True, kw_only=True):
    """A phase of a run: the components it uses, those loaded at its peak, and the bytes of the peak.

    `uncertain` is the error of the peak in bytes, 0 if all its figures are the builder's own.
    """

    name: str
    components: tuple[str, ...]
    loaded: tuple[str, ...]
    peak: Natural
    uncertain: Natural = 0


class MemoryEstimate(Record, frozen=True, kw_only=True):
    """The memory that a run needs under the chosen residency; all figures in bytes.

    `capacity` is the memory of the device or host (None if unknown), `usable` the part that may be used. `keeps` names
    the components that stay loaded between phases, `budgets` the streamable weights of each UNet on the device. `host`
    is the host memory for plans. `missing` is the excess of `peak` over `usable`, 0 if it fits. `least_peak` and
    `largest_peak` are the peaks under the same residency of runs that use the smallest and the largest profiles.
    """

    provider: str
    capacity: Natural | None
    usable: Natural | None
    residency: Residency
    reason: str
    needs: tuple[Need, ...]
    phases: tuple[PhaseEstimate, ...]
    peak: Natural
    keeps: tuple[str, ...] = ()
    budgets: dict[str, Natural] = msgspec.field(default_factory=dict)
    host: Natural = 0
    missing: Natural = 0
    least_peak: Natural = 0
    largest_peak: Natural = 0

    @property
    def estimated(self) -> bool:
        """Whether any figure is an estimate instead of the builder's own."""
        return any(need.uncertain for need in self.needs)

    def check(self) -> None:
        """Raise ResourceError if the plan does not fit; the message states the excess and what needs less."""
        if self.missing:
            raise self.refusal()

    def refusal(self) -> ResourceError:
        """Return the error for a plan that does not fit: what is missing, and what needs less."""
        return ResourceError(f"{self.shortage}; {_remedy(self)}")

    @property
    def shortage(self) -> str:
        """What is missing, as the beginning of an error's line."""
        worst = max(self.phases, key=lambda phase: phase.peak)
        excess, usable = format_bytes(self.missing), format_bytes(self.usable or 0)
        return (f"{self.provider}, residency {self.residency}: {worst.name} needs {_about(worst)}, {excess} more than"
                f" the {usable} that is usable")  # fmt: skip

    def lines(self) -> list[str]:
        """Return the plan as lines for people."""
        lines = [_headline(self), f"residency {self.residency}: {self.reason}", ""]
        lines += [*_need_lines(self), "", *_phase_lines(self)]
        if self.largest_peak > self.peak:
            lines.append(f"at the largest sizes that the plans take, the peak is {format_bytes(self.largest_peak)}")
        if self.host:
            lines.append(f"host memory for plans and streamed weights: {format_bytes(self.host)}")
        if self.missing:
            lines.append(f"does not fit: {format_bytes(self.missing)} too large; {_remedy(self)}")
        return lines


def _headline(plan: MemoryEstimate) -> str:
    where = "device" if on_device(plan.provider) else "host"
    if plan.capacity is None or plan.usable is None:
        return f"{plan.provider}: the amount of {where} memory is unknown"
    have, usable = format_bytes(plan.capacity), format_bytes(plan.usable)
    return f"{plan.provider}: {have} of {where} memory, {usable} of it usable"


def _need_lines(plan: MemoryEstimate) -> list[str]:
    lines = [f"{'component':24}{'weights':>10}{'activations':>13}{'at most':>10}{'in and out':>12}"]
    for need in plan.needs:
        figures = (need.weights, need.activations, need.largest, need.io)
        weights, activations, largest, io = (format_bytes(figure) for figure in figures)
        origin = f"estimate, ±{format_bytes(need.uncertain)}" if need.uncertain else "as built"
        staying = "stays loaded" if need.component in plan.keeps else "loaded for its phase"
        budget = plan.budgets.get(need.component)
        if budget is not None and budget < need.streamable:
            staying += f", {format_bytes(need.streamable - budget)} of its weights in host memory"
        lines.append(f"{need.component:24}{weights:>10}{activations:>13}{largest:>10}{io:>12}  {origin}; {staying}")
    return lines


def _phase_lines(plan: MemoryEstimate) -> list[str]:
    lines = [f"{'phase':10}{'peak':<20}loaded"]
    return lines + [f"{phase.name:10}{_about(phase):<20}{', '.join(phase.loaded)}" for phase in plan.phases]


def _about(phase: PhaseEstimate) -> str:
    uncertain = f" ±{format_bytes(phase.uncertain)}" if phase.uncertain else ""
    return format_bytes(phase.peak) + uncertain


def _remedy(plan: MemoryEstimate) -> str:
    """Return what to type for less memory, for the phase that needs most."""
    worst = max(plan.phases, key=lambda phase: phase.peak)
    streamable = any(need.streamable for need in plan.needs if need.component in worst.loaded)
    if streamable and plan.residency == "swap":
        return "try --residency stream"
    if plan.residency == "resident":
        return "try --residency swap"
    if plan.provider.startswith("tensorrt") and worst.name in ("base", "refiner") and not streamable:
        return "build the plans with --weight-streaming, or for smaller pictures"
    return f"try smaller pictures{', or a device with more memory' if on_device(plan.provider) else ''}"
