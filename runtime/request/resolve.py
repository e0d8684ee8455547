"""A request resolved against a bundle: every default is settled here, once."""

__all__ = ["ResolvedRequest", "resolve_request", "workload_of"]

import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines import IncompatibleError, UsageError
from sdxl_trt.engines.adapters import ScaledLora
from sdxl_trt.engines.bundle import Bundle, Manifest, Scheduler, Workload, lacks_shallow
from sdxl_trt.engines.plans import PlanLimits, size_multiple
from sdxl_trt.runtime.adapters import EmbeddingFact, LoraFact
from sdxl_trt.runtime.controls import Control, check_control_shapes, control_components, settle_controls
from sdxl_trt.runtime.diffusion import CachePolicy, Guidance, comfyui_span, fraction_span, guided_span, reach_of
from sdxl_trt.runtime.diffusion.samplers import sampler_names
from sdxl_trt.runtime.diffusion.schedules import Schedule
from sdxl_trt.runtime.images import Fit, InputPicture, Overlay, as_input, check_input
from sdxl_trt.runtime.request.embeddings import check_sides, embedding_facts, open_embeddings
from sdxl_trt.runtime.request.handoff import StageRanges, StepRange
from sdxl_trt.runtime.request.loras import settled_loras, without_tags
from sdxl_trt.runtime.request.masking import Masking, check_masking, masking_of, settle_masking, takes_mask
from sdxl_trt.runtime.request.request import MAX_SEED, Request
from sdxl_trt.runtime.request.schedules import make_grids
from sdxl_trt.runtime.request.settings import check_settings
from sdxl_trt.runtime.request.side import StageName
from sdxl_trt.runtime.request.sides import ResolvedSide, resolve_sides
from sdxl_trt.runtime.request.sizes import picture_size
from sdxl_trt.runtime.text import Prompt

log = logging.getLogger("sdxl_trt.runtime")
DRAWN_SEED_BITS = 32
FULL_AT_FIRST: Mapping[StageName, int] = {"base": 4, "refiner": 2}
"""The steps that are full whatever is cached: what follows them is extrapolated."""


@dataclass(frozen=True, kw_only=True)
class ResolvedRequest:
    """A request resolved against a bundle: every default is settled. Sizes are pixels.

    `base` and `refiner` are the stages' ranges of the schedule, `refiner` None if it does nothing; `first` is the range
    that starts the run. `latents` None draws the noise from `seeds`; `refiner_seeds` None continues the base's noise.
    `image` is not resized yet; `strength` is 1 without one.
    """

    request: Request
    """The request itself, its sampler settled."""
    schedule: Schedule
    refiner_schedule: Schedule
    """The same, unless the refiner has a schedule of its own."""
    base: StepRange
    refiner: StepRange | None
    first: StepRange
    sides: Mapping[StageName, tuple[ResolvedSide, ResolvedSide]]
    """The conditioning of the positive and the negative side of every stage."""
    prompt: Prompt
    negative: Prompt | None
    """The base's, for the record; None if there is no negative prompt."""
    refiner_sampler: str
    refiner_guidance: float
    seeds: tuple[int, ...]
    refiner_seeds: tuple[int, ...] | None
    width: int
    height: int
    latents: NDArray[np.float32] | None
    image: InputPicture | None
    fit: Fit
    """How the image is brought to the size."""
    strength: float
    masking: Masking | None
    """Which part of the image changes; None without a mask."""
    takes_mask: bool
    """Whether the base's UNet receives the mask itself, and so changes a whole picture."""
    loras: Mapping[StageName, tuple[ScaledLora, ...]] = field(default_factory=dict)
    """The LoRAs of a stage's UNet and text encoders, in order."""
    lora_facts: Mapping[StageName, tuple[LoraFact, ...]] = field(default_factory=dict)
    """What a record says of each of them."""
    controls: tuple[Control, ...] = ()
    """The ControlNets that the base follows."""
    notes: tuple[str, ...] = ()
    """Sentences for the user on what has no effect, to be said once."""
    embeddings: tuple[EmbeddingFact, ...] = ()
    """What a record says of the embeddings that the prompts name."""

    @property
    def comfyui(self) -> bool:
        """Return whether ComfyUI's conventions are followed."""
        return self.request.comfyui

    @property
    def uses_refiner(self) -> bool:
        """Return whether the refiner runs at all."""
        return self.refiner is not None

    @property
    def refiner_only(self) -> bool:
        """Return whether the refiner alone changes an image."""
        return self.first is not self.base

    @property
    def from_noise_alone(self) -> bool:
        """Return whether nothing of the image is in the first latents: a mask at the whole strength, in diffusers."""
        return self.masking is not None and not self.comfyui and self.strength == 1.0 and self.first.start == 0

    @property
    def keeps_picture(self) -> bool:
        """Return whether the latents of the image are used: at the start, or outside a mask."""
        alone = self.takes_mask and not self.comfyui and not self.uses_refiner
        return self.image is not None and not (self.from_noise_alone and alone)

    def overlay(self) -> Overlay | None:
        """Return what pastes the original over a decoded picture; None without a mask, or if nothing is pasted."""
        if self.masking is None or self.image is None:
            return None
        return self.masking.overlay(self.image, self.fit)

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
            return self.request.sampler, self.base
        return self.refiner_sampler, self.refiner or StepRange(self.schedule.steps, self.schedule.steps)

    def prediction_type_of(self, scheduler: Scheduler) -> str:
        """Return what the UNet of a stage with `scheduler` predicts: what was asked for, or what its bundle says."""
        return scheduler.prediction_type if self.request.prediction_type == "auto" else self.request.prediction_type

    def control_span(self, control: Control) -> tuple[float, float]:
        """Return (above, up_to): the sigmas at which a ControlNet works."""
        start, end = control.use.start, control.use.end
        if self.comfyui:
            return comfyui_span(self.schedule, start, end)
        return fraction_span(self.schedule.sigmas, self.base.start, start, end)

    def idle_controls(self) -> tuple[str, ...]:
        """Return a sentence on each ControlNet that works in no step."""
        begun = self.base.sigmas(self.schedule.sigmas)[:-1]
        idle = []
        for control in self.controls:
            above, up_to = self.control_span(control)
            if not ((above < begun) & (begun <= up_to)).any():
                use = control.use
                idle.append(f"{use.told}: no step of the base is within {use.start:g} to {use.end:g} of the run, so the"
                            " ControlNet does nothing")  # fmt: skip
        return tuple(idle)

    def cache_of(self, stage: StageName) -> CachePolicy | None:
        """Return which steps of a stage run the full UNet; None if all do."""
        sampler, part = self.denoising_of(stage)
        policy = CachePolicy(_cache_asked(self.request, stage), FULL_AT_FIRST[stage], reach_of(sampler))
        return None if policy.full_steps(part.steps) == part.steps else policy

    @property
    def cached_stages(self) -> tuple[StageName, ...]:
        """Return the stages of which a step does not run the full UNet."""
        return tuple(stage for stage in FULL_AT_FIRST if self.cache_of(stage) is not None)

    @property
    def caches(self) -> bool:
        """Return whether a step of either stage does not run the full UNet."""
        return bool(self.cached_stages)

    def guidance_of(self, stage: StageName) -> Guidance:
        """Return the guidance of a stage."""
        scale = self.request.guidance if stage == "base" else self.refiner_guidance
        span = guided_span(self.schedule_of(stage).sigmas, *self.request.guidance_interval)
        return Guidance(scale, self.request.guidance_rescale, *span, comfyui_rule=self.comfyui)


def resolve_request(
    request: Request, manifest: Manifest, limits: PlanLimits | None = None, bundle: Bundle | None = None
) -> ResolvedRequest:
    """Settle every default of `request` for a bundle with `manifest`, within what its plans take, if there are any.

    `bundle` is needed for a request with LoRAs. Raises UsageError, and SizeError for sizes; the message names what
    would do. Raises SourceError, CorruptError and IncompatibleError for LoRAs and embeddings.
    """
    request, notes = without_tags(request)
    if request.sampler == "auto":
        request = replace(request, sampler="euler" if request.comfyui else manifest.base.scheduler.sampler)
    check_settings(request)
    _check_samplers(request)
    check_masking(request, manifest)
    if request.vae == "tiny":
        manifest.base.vae.with_tiny_decoder()  # raises without one
    image = None if request.image is None else as_input(request.image)
    image, source, mask = settle_masking(request, image)
    grids = make_grids(request, manifest, image=image is not None, masked=mask is not None)
    guided_span(grids.schedule.sigmas, *request.guidance_interval)
    cuts = grids.cuts
    if "ddim" in (request.sampler, request.refiner_sampler) and not request.comfyui:
        _warn_of_ddim(grids.schedule)
    remedy = _base_instead(request, cuts)
    controls = settle_controls(request.controls, manifest, remedy=remedy, comfyui=request.comfyui)
    _check_guess(request)
    stored = request.latents if request.latents is not None or image is None else image.latents
    shape = None if stored is None else stored.shape
    asked = (request.height, request.width)
    size = picture_size(asked, shape, manifest, limits, refined=cuts.refiner is not None,
                        picture=_shape_of(image, controls, request), outpaint=request.outpaint)  # fmt: skip
    if not request.comfyui:
        check_control_shapes(controls, size, size_multiple(manifest))
    loras, embeddings = settled_loras(request, bundle, _running(cuts, manifest)), open_embeddings(request.embedding_dir)
    sides = resolve_sides(request, manifest, size, loras, embeddings)
    running = {name: both for name, both in sides.items() if name == "base" or cuts.refiner is not None}
    check_sides(running, manifest, comfyui=request.comfyui)
    count = request.count or (shape[0] if shape else None) or 1
    seed = secrets.randbits(DRAWN_SEED_BITS) if request.seed is None else request.seed
    fit: Fit = "cover" if asked != (None, None) else "crop" if request.comfyui else "scale"
    masking = None
    if mask is not None and image is not None:
        masking = masking_of(request, image, source, mask, size, fit, manifest)
        _warn_of_noise(request, cuts)
    resolved = ResolvedRequest(
        request=request,
        schedule=grids.schedule,
        refiner_schedule=grids.refiner,
        base=cuts.base,
        refiner=cuts.refiner,
        first=cuts.first or cuts.base,
        sides=sides,
        prompt=sides["base"][0].prompt,
        negative=None if request.negative is None and request.base_sides is None else sides["base"][1].prompt,
        refiner_sampler=request.refiner_sampler or request.sampler,
        refiner_guidance=request.guidance if request.refiner_guidance is None else request.refiner_guidance,
        seeds=_seeds(seed, count, request),
        refiner_seeds=None if request.refiner_seed is None else _seeds(request.refiner_seed, count, request),
        width=size[1],
        height=size[0],
        latents=_latents(request, manifest, count, size),
        image=None if image is None else check_input(image, manifest, count, size, refine=cuts.first is not None),
        fit=fit,
        strength=grids.strength,
        masking=masking,
        takes_mask=takes_mask(manifest.base, manifest),
        loras=loras.by_stage,
        lora_facts=loras.facts,
        controls=controls,
        notes=(*notes, *loras.notes),
        embeddings=embedding_facts(embeddings),
    )
    return replace(resolved, notes=(*resolved.notes, *_cache_notes(resolved, manifest)))


def workload_of(request: Request, manifest: Manifest) -> Workload:
    """Return what `request` asks of a bundle with `manifest`, before it is resolved; its LoRAs are not read.

    Raises what `control_components` raises.
    """
    runs: Mapping[StageName, bool] = {"base": not request.refine, "refiner": request.handoff is not None}
    return Workload(
        from_image=request.image is not None,
        controls=control_components(request.controls, manifest),
        cached=tuple(stage for stage, runs_it in runs.items() if runs_it and _cache_asked(request, stage) > 1),
        tiny=request.vae == "tiny",
    )


def _running(cuts: StageRanges, manifest: Manifest) -> dict[StageName, bool]:
    """Return whether each of the bundle's stages runs."""
    base = cuts.base.steps > 0
    return {"base": base} if manifest.refiner is None else {"base": base, "refiner": cuts.refiner is not None}


def _warn_of_noise(request: Request, cuts: StageRanges) -> None:
    """Say where ComfyUI's masks and a handoff do not go together."""
    if request.comfyui and cuts.refiner is not None and cuts.first is None and cuts.base.leftover_noise:
        log.warning("as in ComfyUI, the refiner keeps what the base hands over outside the mask, with its noise; give"
                    " --no-refiner, or leave --compat comfyui out")  # fmt: skip


def _shape_of(image: InputPicture | None, controls: Sequence[Control], request: Request) -> tuple[int, int] | None:
    """Return the (height, width) of the picture that the run takes its size from: the image, else a ControlNet's."""
    if image is not None or not controls or request.comfyui:
        return None if image is None else image.size
    return controls[0].picture.size


def _base_instead(request: Request, cuts: StageRanges) -> str:
    """Return what lets the base run too, "" if it does."""
    if cuts.first is None:
        return ""
    return "start with --image instead of --refine" if request.refine else "raise --strength, or give --no-refiner"


def _check_guess(request: Request) -> None:
    if request.control_guess and not request.controls:
        raise UsageError("--control-guess is how ControlNets work; give their pictures with --control")
    if request.control_guess and request.comfyui:
        raise UsageError(
            "--control-guess: ComfyUI's nodes have no such switch; leave it out, or use --compat diffusers"
        )


def _cache_asked(request: Request, stage: StageName) -> int:
    return request.cache if stage == "base" or request.refiner_cache is None else request.refiner_cache


def _cache_notes(resolved: ResolvedRequest, manifest: Manifest) -> tuple[str, ...]:
    """Return what to say of a cache that has no effect, after checking that the request and the bundle allow it."""
    request = resolved.request
    asked = {"--cache": request.cache, "--refiner-cache": request.refiner_cache or 1}
    for option, every in asked.items():
        if every > request.steps:
            raise UsageError(f"{option} {every}: there are {request.steps} steps; choose 2 or 3 to save time, or 1 for"
                             " no cache")  # fmt: skip
    cached = resolved.cached_stages
    if lacking := lacks_shallow(manifest, cached):
        raise IncompatibleError(f"--cache {request.cache}: {lacking}")
    if resolved.uses_refiner and request.refiner_cache not in (None, 1) and "refiner" not in cached:
        return (_without_effect("--refiner-cache", resolved, "refiner"),)
    if not resolved.uses_refiner and request.refiner_cache is not None:
        return ("--refiner-cache has no effect: the refiner takes no step",)
    return () if cached or request.cache == 1 else (_without_effect("--cache", resolved, "base"),)


def _without_effect(option: str, resolved: ResolvedRequest, stage: StageName) -> str:
    first, steps = FULL_AT_FIRST[stage], resolved.denoising_of(stage)[1].steps
    return f"{option} has no effect: the {stage} takes {steps} steps, and the first {first} are full"


def _warn_of_ddim(schedule: Schedule) -> None:
    """Say where diffusers' DDIM gives another picture: it steps evenly, whatever the timesteps that it asks at."""
    stride = schedule.num_train_timesteps // schedule.steps
    if (-np.diff(schedule.timesteps) != stride).any():
        log.warning("ddim goes from each timestep of this schedule to the next; diffusers' DDIMScheduler goes %d down"
                    " from each, and gives another picture: both agree with --schedule leading", stride)  # fmt: skip


def _check_samplers(request: Request) -> None:
    known = sampler_names(comfyui=request.comfyui)
    for option, name in (("--sampler", request.sampler), ("--refiner-sampler", request.refiner_sampler)):
        if name is not None and name not in known:
            raise UsageError(f"{option} {name!r} is unknown; choose one of: {', '.join(known)}")


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
