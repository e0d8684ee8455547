"""The grids that a request runs over, and the parts of them that base and refiner take."""

__all__ = ["Grids", "make_grids"]

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sdxl_trt.engines.manifest import Manifest
from sdxl_trt.runtime.comfy_schedules import DISCARDING
from sdxl_trt.runtime.cuts import Cuts, make_cuts
from sdxl_trt.runtime.sigmas import Schedule, make_comfyui_schedule, make_schedule
from sdxl_trt.runtime.strength import first_step, grid_steps, is_whole, settled_strength

if TYPE_CHECKING:
    from sdxl_trt.runtime.request import Request


@dataclass(frozen=True)
class Grids:
    """The grid, the refiner's (the same, unless it has its own), their parts, and how much of an image is changed."""

    schedule: Schedule
    refiner: Schedule
    cuts: Cuts
    strength: float


def make_grids(request: "Request", manifest: Manifest, *, image: bool) -> Grids:
    """Return what `request` runs over, from an `image` or from noise alone. Raises UsageError."""
    strength = settled_strength(request.strength, request.base_start_step, picture=image, comfyui=request.comfyui)
    schedule = _schedule(request, manifest, strength, image=image)
    own = None
    if request.refiner_strength is not None:
        denoise = settled_strength(request.refiner_strength, 0, picture=True, comfyui=True)
        own = _schedule(request, manifest, denoise, image=False)
    begin = _begin(request, schedule, strength) if image else None
    refiner = manifest.refiner is not None
    cuts = make_cuts(request, schedule, refiner=refiner, picture=begin, refiner_schedule=own)
    return Grids(schedule, own or schedule, cuts, strength)


def _schedule(request: "Request", manifest: Manifest, strength: float, *, image: bool) -> Schedule:
    scheduler = manifest.base.scheduler
    if not request.comfyui:
        schedule = make_schedule(scheduler, request.steps, request.sampler, request.schedule)
        # Noise is added to an image; without one it is made to be all there is.
        return replace(schedule, initial_scale=float(schedule.sigmas[0])) if image else schedule
    most = scheduler.num_train_timesteps - (request.sampler in DISCARDING)
    schedule = make_comfyui_schedule(
        scheduler,
        grid_steps(request.steps, strength, most),
        request.sampler,
        request.schedule or "normal",
        zero_terminal_snr=scheduler.rescale_betas_zero_snr,
    )
    return schedule if is_whole(strength) else schedule.last(request.steps)


def _begin(request: "Request", schedule: Schedule, strength: float) -> int:
    """Return the step at which the image comes in; in ComfyUI's way the grid itself begins there."""
    return request.base_start_step or (0 if request.comfyui else first_step(schedule.steps, strength))
