"""A request on its way through the stages: what it starts from, and where its noise comes from."""

__all__ = ["Job", "start_job"]

from dataclasses import dataclass, field

import numpy as np

from sdxl_trt.engines.bundle.manifest import Manifest, Vae
from sdxl_trt.runtime.encode import Moments
from sdxl_trt.runtime.noise_sources import BatchNoise, NoiseSource, PictureNoise
from sdxl_trt.runtime.prompts import PromptEmbeds
from sdxl_trt.runtime.request import Request, ResolvedRequest
from sdxl_trt.runtime.run import Latents, Run
from sdxl_trt.runtime.sides import StageName

Conditionings = tuple[PromptEmbeds, ...]


@dataclass
class Job:
    """A request on its way through the stages: its run, where each stage's noise comes from, its latents as they stand.

    `embeds` are the positive and negative ones of each stage, once they are read, one for each conditioning that is
    combined. Latents are in the sampler's scale. `posterior` is the noise that an image's latents are drawn with, None
    where they are the mean of what they may be.
    """

    run: Run
    noises: dict[StageName, NoiseSource]
    latents: Latents
    posterior: Latents | None = None
    embeds: dict[StageName, tuple[Conditionings, Conditionings]] = field(default_factory=dict)

    def begin(self, clean: Latents) -> None:
        """Start from `clean` latents, one for all pictures or one each, with the noise that the first stage adds."""
        request = self.run.request
        clean = np.broadcast_to(clean, self.run.initial.shape)
        self.latents = request.first.noised(clean, self.run.initial, request.schedule)

    def begin_from(self, moments: Moments, vae: Vae) -> None:
        """Start from what the encoder of `vae` made of the image."""
        self.begin(moments.drawn(self.posterior, vae))


def start_job(resolved: ResolvedRequest, asked: Request, manifest: Manifest) -> Job:
    """Return the job of a request with its noise drawn, an image's first as diffusers does.

    It is ready for the stages, but for an image that is still to be encoded.
    """
    noises = _noises(resolved)
    noise, vae = noises["refiner" if resolved.refine else "base"], manifest.base.vae
    shape = (vae.latent_channels, resolved.height // vae.factor, resolved.width // vae.factor)
    image = resolved.image
    draws = image is not None and image.pixels is not None and not resolved.comfyui
    posterior = noise.draw(shape) if draws else None
    initial = noise.draw(shape) if resolved.latents is None else resolved.latents.copy()
    run = Run(resolved, initial=initial, final=initial, asked=asked, manifest=manifest)
    job = Job(run, noises, initial, posterior)
    latents = None if image is None else image.latents
    job.begin(np.zeros_like(initial) if latents is None else latents)
    return job


def _noises(request: ResolvedRequest) -> dict[StageName, NoiseSource]:
    """Return what each stage draws its noise from; the refiner, without a seed of its own, from the base's."""
    base = _noise(request, request.seeds)
    return {"base": base, "refiner": _noise(request, request.refiner_seeds) if request.refiner_seeds else base}


def _noise(request: ResolvedRequest, seeds: tuple[int, ...]) -> NoiseSource:
    return BatchNoise(seeds[0], len(seeds)) if request.comfyui else PictureNoise(seeds)
