"""What is asked for, and what that comes to for one bundle: defaults are resolved once, here."""

__all__ = ["Request", "ResolvedRequest", "resolve"]

import math
import secrets
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines.errors import SizeError, UsageError
from sdxl_trt.engines.manifest import Manifest
from sdxl_trt.engines.plans import Limits
from sdxl_trt.runtime.conditioning import MicroConditions
from sdxl_trt.runtime.guidance import Guidance, guided_span
from sdxl_trt.runtime.handoff import step_at_fraction
from sdxl_trt.runtime.prompts import Prompt
from sdxl_trt.runtime.samplers import sampler_names
from sdxl_trt.runtime.sigmas import Schedule, make_schedule

DEFAULT_HANDOFF = 0.8
MAX_SIDE = 16384
MAX_COUNT = 10_000
MAX_SEED = 2**64 - 1
DRAWN_SEED_BITS = 32


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """Settings that need no resolution."""

    steps: int = 30
    guidance: float = 5.0
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """The part of the steps that is guided, as fractions; the others run the prompt alone, in half the rows."""
    sampler: str = "euler"
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5
    tile: bool = False
    """Decode in tiles, also where the decoder could take the whole picture."""


@dataclass(frozen=True)
class Request(_Settings):
    """What a user asks for. None takes the default that fits the bundle.

    `handoff` is the fraction of the noise range that the base denoises (diffusers' denoising_end), None for the
    base alone, "auto" for 0.8 where the bundle has a refiner; `handoff_step` states it in steps instead.
    `negative` None is an absent negative prompt, which is not the same as "". Picture i has seed `seed` + i.
    `latents` is the initial noise, float32 (count, channels, height/8, width/8) of unit variance.
    """

    prompt: str = ""
    prompt_2: str | None = None
    negative: str | None = None
    negative_2: str | None = None
    refiner_sampler: str | None = None
    schedule: str = ""
    """``SPACING[+TRANSFORM]``, as diffusers makes it for the sampler's scheduler class; "" is the config's spacing."""
    handoff: float | Literal["auto"] | None = "auto"
    handoff_step: int | None = None
    refiner_guidance: float | None = None
    seed: int | None = None
    count: int | None = None
    width: int | None = None
    height: int | None = None
    latents: NDArray[np.float32] | None = None


@dataclass(frozen=True, kw_only=True)
class ResolvedRequest(_Settings):
    """A request against a bundle, every default settled. Sizes are pixels; `cut` is the base's number of steps.

    `negative` None is an absent negative prompt (each stage's config says what stands for it), `latents` None draws
    the noise from `seeds`.
    """

    prompt: Prompt
    negative: Prompt | None
    cut: int
    schedule: Schedule
    spacing: str
    """What was asked for as the schedule; "" for the model's own."""
    refiner_sampler: str
    refiner_guidance: float
    seeds: tuple[int, ...]
    width: int
    height: int
    latents: NDArray[np.float32] | None
    micro: MicroConditions

    @property
    def refined(self) -> bool:
        """Return whether the refiner runs at all."""
        return self.cut < self.schedule.steps

    def guidance_of(self, stage: Literal["base", "refiner"]) -> Guidance:
        """Return the guidance of a stage."""
        scale = self.guidance if stage == "base" else self.refiner_guidance
        return Guidance(scale, self.guidance_rescale, *guided_span(self.schedule.sigmas, *self.guidance_interval))


def resolve(request: Request, manifest: Manifest, limits: Limits | None = None) -> ResolvedRequest:
    """Settle every default of `request` for a bundle with `manifest`, within what its plans take, if there are any.

    Raises UsageError, and SizeError for sizes; the message names what would do.
    """
    _check_ranges(request)
    schedule = make_schedule(manifest.base.scheduler, request.steps, request.sampler, request.schedule)
    guided_span(schedule.sigmas, *request.guidance_interval)
    cut = _cut(request, manifest, schedule)
    width, height = _size(request, manifest, limits, refined=cut < schedule.steps)
    size = (height, width)
    return ResolvedRequest(
        steps=request.steps,
        guidance=request.guidance,
        guidance_rescale=request.guidance_rescale,
        guidance_interval=request.guidance_interval,
        sampler=request.sampler,
        aesthetic_score=request.aesthetic_score,
        negative_aesthetic_score=request.negative_aesthetic_score,
        tile=request.tile,
        prompt=_prompt(request.prompt, request.prompt_2),
        negative=_negative(request),
        cut=cut,
        schedule=schedule,
        spacing=request.schedule,
        refiner_sampler=request.refiner_sampler or request.sampler,
        refiner_guidance=request.guidance if request.refiner_guidance is None else request.refiner_guidance,
        seeds=_seeds(request),
        width=width,
        height=height,
        latents=_latents(request, manifest, size),
        micro=MicroConditions(size, (0, 0), size, request.aesthetic_score, request.negative_aesthetic_score),
    )


def _prompt(text: str, text_2: str | None) -> Prompt:
    # As in diffusers, an empty second prompt means the first one.
    return Prompt(text, text_2 or text)


def _negative(request: Request) -> Prompt | None:
    if request.negative is None:
        if request.negative_2 is not None:
            raise UsageError('--negative-2 without --negative: give --negative too, "" if it is to be empty')
        return None
    return _prompt(request.negative, request.negative_2)


def _check_ranges(request: Request) -> None:
    for option, name in (("--sampler", request.sampler), ("--refiner-sampler", request.refiner_sampler)):
        if name is not None and name not in sampler_names():
            raise UsageError(f"{option} {name!r} is unknown; choose one of: {', '.join(sampler_names())}")
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
    if request.seed is not None and not 0 <= request.seed <= MAX_SEED:
        raise UsageError(f"--seed {request.seed}: choose 0 to {MAX_SEED}")


def _cut(request: Request, manifest: Manifest, schedule: Schedule) -> int:
    """Return how many steps the base takes; all of them without a handoff."""
    if request.handoff is None and request.handoff_step is None:
        return schedule.steps
    asked = request.handoff != "auto" or request.handoff_step is not None
    if manifest.refiner is None:
        if asked:
            raise UsageError("a handoff was asked for, but the bundle has no refiner; leave --handoff out, or export"
                             " the bundle with --refiner SRC")  # fmt: skip
        return schedule.steps
    if request.handoff_step is not None:
        if request.handoff not in ("auto", None):
            raise UsageError("--handoff and --handoff-step state the same thing; give one of them")
        if not 1 <= request.handoff_step < schedule.steps:
            raise UsageError(f"--handoff-step {request.handoff_step}: choose 1 to {schedule.steps - 1} of"
                             f" {schedule.steps} steps, or --no-refiner")  # fmt: skip
        return request.handoff_step
    return _cut_at_fraction(DEFAULT_HANDOFF if request.handoff == "auto" else request.handoff, schedule, asked=asked)


def _cut_at_fraction(fraction: float | None, schedule: Schedule, *, asked: bool) -> int:
    if fraction is None or not 0.0 < fraction < 1.0:
        raise UsageError(f"--handoff {fraction}: choose a fraction between 0 and 1 (0.8 is usual), or none")
    cut = step_at_fraction(schedule, fraction)
    if asked and not 0 < cut < schedule.steps:
        idle = "base" if cut == 0 else "refiner"
        raise UsageError(
            f"--handoff {fraction} leaves the {idle} no step of {schedule.steps}; take more --steps, another fraction,"
            " or --handoff none"
        )
    return max(cut, 1)


def _size(request: Request, manifest: Manifest, limits: Limits | None, *, refined: bool) -> tuple[int, int]:
    base = manifest.base
    multiple = base.size_multiple
    if refined and manifest.refiner is not None:
        multiple = math.lcm(multiple, manifest.refiner.size_multiple)
    factor = base.vae.factor
    from_latents = request.latents.shape[2:] if request.latents is not None and request.latents.ndim == 4 else None
    usual = max(base.sample_size * factor // multiple, 1) * multiple
    height, width = (usual, usual) if limits is None else (limits.height.opt, limits.width.opt)
    if from_latents:
        height, width = (side * factor for side in from_latents)
    sides = {
        "--width": width if request.width is None else request.width,
        "--height": height if request.height is None else request.height,
    }
    for option, side in sides.items():
        if side % multiple or not 0 < side <= MAX_SIDE:
            below = min(max(side // multiple, 1) * multiple, MAX_SIDE // multiple * multiple)
            above = min(below + multiple, MAX_SIDE // multiple * multiple)
            near = f"{below}" if side < multiple or below == above else f"{below} or {above}"
            raise SizeError(f"{option} {side}: the UNets in use take multiples of {multiple}; try {near}")
    if limits is not None:
        limits.check(sides["--width"], sides["--height"])
    return sides["--width"], sides["--height"]


def _seeds(request: Request) -> tuple[int, ...]:
    given = request.latents.shape[0] if request.latents is not None and request.latents.ndim else None
    count = request.count or given or 1
    first = secrets.randbits(DRAWN_SEED_BITS) if request.seed is None else request.seed
    return tuple((first + i) & MAX_SEED for i in range(count))


def _latents(request: Request, manifest: Manifest, size: tuple[int, int]) -> NDArray[np.float32] | None:
    if request.latents is None:
        return None
    vae, (height, width) = manifest.base.vae, size
    expected = (len(_seeds(request)), vae.latent_channels, height // vae.factor, width // vae.factor)
    if request.latents.shape != expected:
        raise UsageError(f"--latents: shape {list(request.latents.shape)} given, {list(expected)} expected for"
                         f" {expected[0]} picture(s) of {width}x{height}")  # fmt: skip
    if request.latents.dtype != np.float32 or not np.isfinite(request.latents).all():
        raise UsageError("--latents: give finite float32 values of unit variance")
    return request.latents
