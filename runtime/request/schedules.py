"""The schedules of a request, and the ranges of them that base and refiner run."""

__all__ = ["Grids", "make_grids"]

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from sdxl_trt.engines.bundle import Manifest, Scheduler
from sdxl_trt.runtime.diffusion.schedules import (
    DISCARDING,
    Schedule,
    Table,
    comfyui_training_sigmas,
    make_comfyui_schedule,
    make_schedule,
)
from sdxl_trt.runtime.request.handoff import StageRanges, split_steps
from sdxl_trt.runtime.request.strength import first_step, grid_steps, is_whole, settled_strength

if TYPE_CHECKING:
    from sdxl_trt.runtime.request.request import Request


log = logging.getLogger("sdxl_trt.runtime")
_IDLE_FOR_ONE = frozenset({"uni_pc", "uni_pc_bh2"})


@dataclass(frozen=True)
class _Expert:
    """What determines an expert's schedule in ComfyUI's way: its training sigmas and its sampler."""

    scheduler: Scheduler
    sampler: str

    def shares(self, other: "_Expert") -> bool:
        """Return whether `other` has the same schedule."""
        alike = (self.sampler in DISCARDING) == (other.sampler in DISCARDING)
        return alike and np.array_equal(self.table, other.table)

    @property
    def table(self) -> Table:
        """Return the model's training sigmas."""
        return comfyui_training_sigmas(self.scheduler, zero_terminal_snr=self.scheduler.rescale_betas_zero_snr)


@dataclass(frozen=True)
class Grids:
    """The schedule, the refiner's (the same, unless it has its own), their ranges, and the strength."""

    schedule: Schedule
    refiner: Schedule
    cuts: StageRanges
    strength: float


def make_grids(request: "Request", manifest: Manifest, *, image: bool, masked: bool = False) -> Grids:
    """Return the schedules of `request`, which starts from an `image` or from noise; `masked` if a part of it stays.

    Raises UsageError.
    """
    strength = settled_strength(request.strength, request.base_start_step, picture=image, comfyui=request.comfyui,
                                masked=masked)  # fmt: skip
    experts = _experts(request, manifest)
    # As in diffusers, the whole strength with a mask starts from noise alone.
    schedule = _schedule(request, experts[0], strength, image=image and not (masked and strength == 1.0))
    own = _own(request, experts, strength) if request.comfyui else None
    begin = _begin(request, schedule, strength) if image else None
    # If two schedules have equally many steps, a step of one is a step of the other.
    apart = own if request.refiner_strength is not None or (own and own.steps != schedule.steps) else None
    refiner = manifest.refiner is not None
    cuts = split_steps(request, schedule, refiner=refiner, picture=begin, refiner_schedule=apart)
    if own is not None and cuts.first is not None:
        schedule, own = own, None
    if request.comfyui:
        _warn_of_single_steps(cuts, experts)
    return Grids(schedule, own or schedule, cuts, strength)


def _experts(request: "Request", manifest: Manifest) -> tuple[_Expert, ...]:
    """Return the experts whose schedules a run uses, base first; diffusers always uses the base's."""
    base = _Expert(manifest.base.scheduler, request.sampler)
    if manifest.refiner is None or not request.comfyui:
        return (base,)
    refiner = _Expert(manifest.refiner.scheduler, request.refiner_sampler or request.sampler)
    return (refiner,) if request.refine else (base, refiner)


def _own(request: "Request", experts: tuple[_Expert, ...], strength: float) -> Schedule | None:
    """Return the refiner's own schedule, as each of ComfyUI's samplers has one, or None if it equals the base's."""
    if request.refiner_strength is not None:
        denoise = settled_strength(request.refiner_strength, 0, picture=True, comfyui=True)
        return _schedule(request, experts[-1], denoise, image=False)
    return None if experts[0].shares(experts[-1]) else _schedule(request, experts[-1], strength, image=False)


def _schedule(request: "Request", expert: _Expert, strength: float, *, image: bool) -> Schedule:
    scheduler = expert.scheduler
    if not request.comfyui:
        schedule = make_schedule(scheduler, request.steps, request.sampler, request.schedule)
        # Noise is added to an image; without one, the start is pure noise.
        return replace(schedule, initial_scale=float(schedule.sigmas[0])) if image else schedule
    most = scheduler.num_train_timesteps - (expert.sampler in DISCARDING)
    schedule = make_comfyui_schedule(
        scheduler,
        grid_steps(request.steps, strength, most),
        expert.sampler,
        request.schedule or "normal",
        zero_terminal_snr=scheduler.rescale_betas_zero_snr,
    )
    return schedule if is_whole(strength) else schedule.last(request.steps)


def _begin(request: "Request", schedule: Schedule, strength: float) -> int:
    """Return the step at which the image is the start; in ComfyUI's way the schedule itself begins there."""
    stated = request.strength is not None
    return request.base_start_step or (0 if request.comfyui else first_step(schedule.steps, strength, stated=stated))


def _warn_of_single_steps(cuts: StageRanges, experts: tuple[_Expert, ...]) -> None:
    parts = [cuts.base, cuts.refiner] if cuts.first is None else [cuts.refiner]
    for part, expert in zip(parts, experts[-len(parts) :], strict=False):
        if part is not None and part.steps == 1 and expert.sampler in _IDLE_FOR_ONE:
            log.warning("%s with a single step leaves the noise as it is, in ComfyUI too; take two", expert.sampler)
