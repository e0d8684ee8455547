"""A request while it runs: its steps, latents, noise and timings."""

__all__ = ["Handoff", "Job", "PhaseName", "Run", "Step", "start_job", "timed"]

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from sdxl_trt.engines.bundle import Manifest, Vae
from sdxl_trt.runtime.arrays import Latents
from sdxl_trt.runtime.diffusion import Inpaint, Keeper, NoiseMask
from sdxl_trt.runtime.diffusion.noise import BatchNoise, NoiseSource, PictureNoise
from sdxl_trt.runtime.images import Picture
from sdxl_trt.runtime.request import Request, ResolvedRequest, StageName
from sdxl_trt.runtime.text import PromptEmbeds
from sdxl_trt.runtime.vae import Moments

PhaseName = Literal["picture", "encode", "load", "base", "refiner", "decode"]


@dataclass(frozen=True)
class Step:
    """One unit of work: prompts or an image encoded, an engine loaded, a sampler step of a group, a picture decoded.

    `index` counts from 1 to `total` within `stage` over all pictures; `seconds` is the duration of this unit. After a
    sampler step, `latents` are those of the pictures `pictures` (a copy that the caller may change), and `denoised` is
    the current estimate of the final latents (read-only: the sampler may use it again). After a decode, `picture` is
    the finished one. Otherwise all three are None.
    """

    stage: PhaseName
    index: int
    total: int
    pictures: slice
    seconds: float = 0.0
    latents: Latents | None = None
    picture: Picture | None = None
    denoised: Latents | None = None
    full: bool = True
    """Whether the whole UNet ran in a sampler step: not in each with a step cache."""
    node: str = ""
    """The id of the node of a workflow that worked, where that is known."""


@dataclass(frozen=True)
class Handoff:
    """Where the refiner took over: after `step` steps, at `timestep` and `sigma`."""

    step: int
    timestep: float
    sigma: float


@dataclass
class Run:
    """The results of a request: latents (count, c, h, w) float32, and the seconds of every stage and step.

    `initial` has unit variance; `handoff_latents` are what the refiner received (None without a refiner); `final` are
    what the autoencoder received, before its scaling is undone.
    """

    request: ResolvedRequest
    initial: Latents
    final: Latents
    handoff_latents: Latents | None = None
    handoff: Handoff | None = None
    timings: dict[str, list[float]] = field(default_factory=dict)
    full_steps: dict[StageName, int] = field(default_factory=dict)
    """The steps so far of each stage that ran the full UNet, of every picture: all of them without a cache."""
    asked: Request = field(default_factory=Request)
    """The request before its defaults were settled."""
    manifest: Manifest | None = None
    """The bundle's manifest, which the pictures' records name."""
    computed: str | None = None
    """The precision in which every graph was computed; None if each was computed in its own."""


def timed(run: Run, work: Iterator[Step]) -> Iterator[Step]:
    """Yield the steps of `work` with their durations, which exclude the time the caller spends between them."""
    started = time.perf_counter()
    for step in work:
        seconds = time.perf_counter() - started
        run.timings.setdefault(step.stage, []).append(seconds)
        yield replace(step, seconds=seconds)
        started = time.perf_counter()


Conditionings = tuple[PromptEmbeds, ...]


@dataclass
class Job:
    """A request between stages: its run, each stage's source of noise, and its current latents in the sampler's scale.

    `embeds` holds the positive and the negative embeddings of each stage once they are encoded, one for each combined
    conditioning. `posterior` is the noise that an image's latents are sampled with, or None to take their mean;
    `masked_posterior` is that of the image without its masked part.
    """

    run: Run
    noises: dict[StageName, NoiseSource]
    latents: Latents
    posterior: Latents | None = None
    masked_posterior: Latents | None = None
    embeds: dict[StageName, tuple[Conditionings, Conditionings]] = field(default_factory=dict)
    mask: Latents | None = None
    """(1 or count, 1, h, w), 1 where the latents change and 0 where `clean` stays; None without a mask."""
    clean: Latents | None = None
    """What the run started from, before noise was added: (count, c, h, w)."""
    kept_noise: Latents | None = None
    """The unit-variance noise of what stays in the current stage; None is that of the start."""
    further: Latents | None = None
    """(count, 1 + c, h, w), the mask and the masked image's latents, for a base that receives them."""
    kept_later: tuple[Moments, Vae] | None = None
    """The encoded image, if nothing of it is used before the refiner: `keep_picture` draws from it."""

    def begin(self, clean: Latents) -> None:
        """Start from `clean` latents, one for all pictures or one each, with the noise that the first stage adds."""
        request = self.run.request
        self.clean = np.broadcast_to(clean, self.run.initial.shape)
        start = np.zeros_like(self.clean) if request.from_noise_alone else self.clean
        self.latents = request.first.noised(start, self.run.initial, request.schedule)

    def begin_from(self, moments: Moments, vae: Vae) -> None:
        """Start from the moments that the encoder of `vae` returned for the image."""
        if _draws_late(self.run.request):
            self.kept_later = moments, vae
        else:
            self.begin(moments.drawn(self.posterior, vae))

    def keep_picture(self) -> None:
        """Draw the image that the refiner keeps, if no stage has used it yet.

        As in diffusers, a base that receives the mask draws none: how the base's noise goes on cannot depend on what
        follows it.
        """
        if self.kept_later is not None:
            moments, vae = self.kept_later
            drawn = self.noises["refiner"].draw(self.run.initial.shape[1:])
            self.clean = np.broadcast_to(moments.drawn(drawn, vae), self.run.initial.shape)

    def show(self, moments: Moments, vae: Vae) -> None:
        """Let the base see the mask, and the image without its masked part, whose `moments` the encoder returned."""
        masking = self.run.request.masking
        assert masking is not None  # noqa: S101 - else nothing is masked
        seen = np.rint(masking.of_latents(vae.factor, soft=self.run.request.comfyui))
        latents = np.broadcast_to(moments.drawn(self.masked_posterior, vae), self.run.initial.shape)
        self.further = np.concatenate([np.broadcast_to(seen, (len(latents), *seen.shape[1:])), latents], axis=1)

    def final(self) -> Latents:
        """Return the latents for the decoder (count, c, h, w), after the last stage's steps."""
        scale = self.run.request.final_scale
        latents = self.latents * np.float32(scale)
        if scale == 1.0 or self.mask is None or self.clean is None or self.run.request.comfyui:
            return latents
        # Scaling there and back would change the last bits of what stays.
        return latents if self.keeper(self._last) is None else np.where(self.mask == 0.0, self.clean, latents)

    @property
    def _last(self) -> StageName:
        return "refiner" if self.run.request.uses_refiner else "base"

    def keeper(self, stage: StageName) -> Keeper | None:
        """Return what keeps the image outside the mask in `stage`; None if nothing is kept."""
        request = self.run.request
        if self.mask is None or self.clean is None:
            return None
        noise = self.run.initial if self.kept_noise is None else self.kept_noise
        if request.comfyui:
            return NoiseMask(self.mask, self.clean, noise)
        if stage == "base" and request.takes_mask:
            return None
        return Inpaint(self.mask, self.clean, noise, request.schedule_of(stage).variance_preserving)


def start_job(resolved: ResolvedRequest, asked: Request, manifest: Manifest, computed: str | None = None) -> Job:
    """Return the job of a request with its noise drawn, in diffusers' order: image, start, masked image.

    It is ready for the stages, except for an image that is not encoded yet.
    """
    noises = _noises(resolved)
    noise, vae = noises["refiner" if resolved.refiner_only else "base"], manifest.base.vae
    shape = (vae.latent_channels, resolved.height // vae.factor, resolved.width // vae.factor)
    image, masking = resolved.image, resolved.masking
    draws = image is not None and image.pixels is not None and not resolved.comfyui
    posterior = noise.draw(shape) if draws and not _draws_late(resolved) else None
    initial = noise.draw(shape) if resolved.latents is None else resolved.latents.copy()
    # diffusers encodes the masked image for every model, and most do not use it.
    masked_posterior = noise.draw(shape) if draws and masking is not None else None
    run = Run(resolved, initial=initial, final=initial, asked=asked, manifest=manifest, computed=computed)
    job = Job(run, noises, initial, posterior, masked_posterior)
    if masking is not None:
        job.mask = masking.of_latents(vae.factor, soft=resolved.comfyui)
    if not resolved.first.add_noise and resolved.comfyui:
        job.kept_noise = np.zeros_like(initial)
    latents = None if image is None else image.latents
    job.begin(np.zeros_like(initial) if latents is None else latents)
    return job


def _draws_late(request: ResolvedRequest) -> bool:
    """Return whether nothing of the image is used before the refiner; diffusers then encodes no image for the base."""
    return request.from_noise_alone and request.takes_mask and not request.refiner_only


def _noises(request: ResolvedRequest) -> dict[StageName, NoiseSource]:
    """Return each stage's source of noise; without a seed of its own, the refiner continues the base's."""
    base = _noise(request, request.seeds)
    return {"base": base, "refiner": _noise(request, request.refiner_seeds) if request.refiner_seeds else base}


def _noise(request: ResolvedRequest, seeds: tuple[int, ...]) -> NoiseSource:
    return BatchNoise(seeds[0], len(seeds)) if request.comfyui else PictureNoise(seeds)
