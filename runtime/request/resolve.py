"""A request resolved against a bundle: every default is settled here, once."""

__all__ = ["ResolvedRequest", "resolve_request"]


import logging
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.bundle import Manifest, Scheduler
from sdxl_trt.engines.plans import PlanLimits
from sdxl_trt.runtime.diffusion import PREDICTIONS, Guidance, guided_span
from sdxl_trt.runtime.diffusion.samplers import sampler_names
from sdxl_trt.runtime.diffusion.schedules import Schedule
from sdxl_trt.runtime.images import Fit, InputPicture, as_input, check_input
from sdxl_trt.runtime.request.handoff import StepRange
from sdxl_trt.runtime.request.request import PlainSettings, Request
from sdxl_trt.runtime.request.schedules import make_grids
from sdxl_trt.runtime.request.sides import ResolvedSide, StageName, resolve_sides
from sdxl_trt.runtime.request.sizes import picture_size
from sdxl_trt.runtime.text import Prompt

log = logging.getLogger("sdxl_trt.runtime")
DRAWN_SEED_BITS = 32
COMPATS = ("diffusers", "comfyui")
MAX_COUNT = 10_000
MAX_SEED = 2**64 - 1


@dataclass(frozen=True, kw_only=True)
class ResolvedRequest(PlainSettings):
    """A request against a bundle, every default settled. Sizes are pixels.

    `base` and `refiner` are the stages' parts of the schedule, `refiner` None where it does nothing; `first` is the
    one that starts the run. `latents` None draws the noise from `seeds`; `refiner_seeds` None goes on with the base's
    noise. `image` is not yet of this size; `strength` is 1 without one.
    """

    schedule: Schedule
    refiner_schedule: Schedule
    """The same, but where the refiner has a grid of its own."""
    spacing: str
    """What was asked for as the schedule; "" for the model's own."""
    base: StepRange
    refiner: StepRange | None
    first: StepRange
    sides: Mapping[StageName, tuple[ResolvedSide, ResolvedSide]]
    """What the positive and the negative side of every stage are told."""
    prompt: Prompt
    negative: Prompt | None
    """The base's, for the record; None for an absent one."""
    aesthetic_score: float
    negative_aesthetic_score: float
    refiner_sampler: str
    refiner_guidance: float
    seeds: tuple[int, ...]
    refiner_seeds: tuple[int, ...] | None
    width: int
    height: int
    latents: NDArray[np.float32] | None
    image: InputPicture | None
    fit: Fit
    """How the image comes to the size."""
    strength: float

    @property
    def uses_refiner(self) -> bool:
        """Return whether the refiner runs at all."""
        return self.refiner is not None

    @property
    def refiner_only(self) -> bool:
        """Return whether the refiner alone changes an image."""
        return self.first is not self.base

    @property
    def cut(self) -> int:
        """Return the step at which the refiner takes over, or the base stops."""
        shared = self.refiner_schedule is self.schedule
        return self.base.stop if self.refiner is None or not shared else self.refiner.start

    @property
    def final_scale(self) -> float:
        """Return what the last latents are multiplied by before they are decoded."""
        last, schedule = (self.base, self.schedule)
        if self.refiner is not None:
            last, schedule = self.refiner, self.refiner_schedule
        return schedule.final_scale if last.stop == schedule.steps else 1.0

    def schedule_of(self, stage: StageName) -> Schedule:
        """Return the grid of a stage."""
        return self.schedule if stage == "base" else self.refiner_schedule

    def denoising_of(self, stage: StageName) -> tuple[str, StepRange]:
        """Return the sampler of a stage and its part of the schedule; an idle refiner has no step."""
        if stage == "base":
            return self.sampler, self.base
        return self.refiner_sampler, self.refiner or StepRange(self.schedule.steps, self.schedule.steps)

    def prediction_type_of(self, scheduler: Scheduler) -> str:
        """Return what the UNet of a stage with `scheduler` predicts: what was asked for, or what its bundle says."""
        return scheduler.prediction_type if self.prediction_type == "auto" else self.prediction_type

    def guidance_of(self, stage: StageName) -> Guidance:
        """Return the guidance of a stage."""
        scale = self.guidance if stage == "base" else self.refiner_guidance
        span = guided_span(self.schedule_of(stage).sigmas, *self.guidance_interval)
        return Guidance(scale, self.guidance_rescale, *span, comfyui_rule=self.comfyui)


def resolve_request(request: Request, manifest: Manifest, limits: PlanLimits | None = None) -> ResolvedRequest:
    """Settle every default of `request` for a bundle with `manifest`, within what its plans take, if there are any.

    Raises UsageError, and SizeError for sizes; the message names what would do.
    """
    if request.sampler == "auto":
        request = replace(request, sampler="euler" if request.comfyui else manifest.base.scheduler.sampler)
    _check_names(request)
    _check_ranges(request)
    image = None if request.image is None else as_input(request.image)
    grids = make_grids(request, manifest, image=image is not None)
    guided_span(grids.schedule.sigmas, *request.guidance_interval)
    cuts = grids.cuts
    if "ddim" in (request.sampler, request.refiner_sampler) and not request.comfyui:
        _warn_of_ddim(grids.schedule)
    stored = request.latents if request.latents is not None or image is None else image.latents
    shape = None if stored is None else stored.shape
    asked = (request.height, request.width)
    size = picture_size(asked, shape, manifest, limits, refined=cuts.refiner is not None,
                        picture=None if image is None else image.size)  # fmt: skip
    sides = resolve_sides(request.prompt, request, manifest, size, comfyui=request.comfyui)
    count = request.count or (shape[0] if shape else None) or 1
    seed = secrets.randbits(DRAWN_SEED_BITS) if request.seed is None else request.seed
    return ResolvedRequest(
        compat=request.compat,
        steps=request.steps,
        guidance=request.guidance,
        guidance_rescale=request.guidance_rescale,
        guidance_interval=request.guidance_interval,
        sampler=request.sampler,
        prediction_type=request.prediction_type,
        tile=request.tile,
        schedule=grids.schedule,
        refiner_schedule=grids.refiner,
        spacing=request.schedule,
        base=cuts.base,
        refiner=cuts.refiner,
        first=cuts.first or cuts.base,
        sides=sides,
        prompt=sides["base"][0].prompt,
        negative=None if request.negative is None and request.base_sides is None else sides["base"][1].prompt,
        aesthetic_score=request.aesthetic_score,
        negative_aesthetic_score=request.negative_aesthetic_score,
        refiner_sampler=request.refiner_sampler or request.sampler,
        refiner_guidance=request.guidance if request.refiner_guidance is None else request.refiner_guidance,
        seeds=_seeds(seed, count, request),
        refiner_seeds=None if request.refiner_seed is None else _seeds(request.refiner_seed, count, request),
        width=size[1],
        height=size[0],
        latents=_latents(request, manifest, count, size),
        image=None if image is None else check_input(image, manifest, count, size, refine=cuts.first is not None),
        fit="cover" if asked != (None, None) else "crop" if request.comfyui else "scale",
        strength=grids.strength,
    )


def _warn_of_ddim(schedule: Schedule) -> None:
    """Say where diffusers' DDIM gives another picture: it steps evenly, whatever the timesteps that it asks at."""
    stride = schedule.num_train_timesteps // schedule.steps
    if (-np.diff(schedule.timesteps) != stride).any():
        log.warning("ddim goes from each timestep of this schedule to the next; diffusers' DDIMScheduler goes %d down"
                    " from each, and gives another picture: both agree with --schedule leading", stride)  # fmt: skip


def _check_names(request: Request) -> None:
    if request.compat not in COMPATS:
        raise UsageError(f"--compat {request.compat!r} is unknown; choose one of: {', '.join(COMPATS)}")
    known = sampler_names(comfyui=request.comfyui)
    for option, name in (("--sampler", request.sampler), ("--refiner-sampler", request.refiner_sampler)):
        if name is not None and name not in known:
            raise UsageError(f"{option} {name!r} is unknown; choose one of: {', '.join(known)}")
    if request.prediction_type not in ("auto", *PREDICTIONS):
        raise UsageError(f"--prediction-type {request.prediction_type!r} is unknown; choose one of: auto,"
                         f" {', '.join(PREDICTIONS)}")  # fmt: skip


def _check_ranges(request: Request) -> None:
    numbers = {
        "--guidance": request.guidance,
        "--refiner-guidance": request.refiner_guidance,
        "--guidance-rescale": request.guidance_rescale,
        "--aesthetic-score": request.aesthetic_score,
        "--negative-aesthetic-score": request.negative_aesthetic_score,
    }
    for option, value in numbers.items():
        if value is not None and not math.isfinite(value):
            raise UsageError(f"{option} {value}: give a finite number")
    if not 0.0 <= request.guidance_rescale <= 1.0:
        raise UsageError(f"--guidance-rescale {request.guidance_rescale}: choose 0 to 1")
    if request.count is not None and not 1 <= request.count <= MAX_COUNT:
        raise UsageError(f"-n {request.count}: ask for at least one picture, and at most {MAX_COUNT}")
    for seed in (request.seed, request.refiner_seed):
        if seed is not None and not 0 <= seed <= MAX_SEED:
            raise UsageError(f"--seed {seed}: choose 0 to {MAX_SEED}")


def _seeds(first: int, count: int, request: Request) -> tuple[int, ...]:
    return tuple(first if request.comfyui else (first + i) & MAX_SEED for i in range(count))


def _latents(request: Request, manifest: Manifest, count: int, size: tuple[int, int]) -> NDArray[np.float32] | None:
    if request.latents is None:
        return None
    vae, (height, width) = manifest.base.vae, size
    expected = (count, vae.latent_channels, height // vae.factor, width // vae.factor)
    if request.latents.shape != expected:
        raise UsageError(f"--latents: shape {list(request.latents.shape)} given, {list(expected)} expected for"
                         f" {count} picture(s) of {width}x{height}")  # fmt: skip
    if request.latents.dtype != np.float32 or not np.isfinite(request.latents).all():
        raise UsageError("--latents: give finite float32 values of unit variance")
    return request.latents
