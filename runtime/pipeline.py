"""Prompt to pictures, read as the list of stages: encode, base, handoff, refiner, decode.

A request runs phase-major: all prompts are encoded, all pictures take their base steps, the experts change once,
all pictures take their refiner steps, all are decoded. Each phase tells the pool what the next one needs.
"""

__all__ = ["Handoff", "Job", "Picture", "Pipeline", "Run", "Step", "open_bundle"]

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from sdxl_trt.engines.bundle import read_bundle
from sdxl_trt.engines.errors import SizeError
from sdxl_trt.engines.manifest import Stage, Vae
from sdxl_trt.engines.pool import EnginePool, open_pool
from sdxl_trt.runtime.conditioning import make_conditions
from sdxl_trt.runtime.cuts import Part
from sdxl_trt.runtime.decode import choose_tile, decode, decoder_sizes
from sdxl_trt.runtime.denoiser import Denoiser
from sdxl_trt.runtime.images import to_uint8, to_uint8_truncated
from sdxl_trt.runtime.noise import BatchNoise, NoiseSource, PictureNoise
from sdxl_trt.runtime.prompts import Prompt, PromptEmbeds, PromptEncoder
from sdxl_trt.runtime.request import Request, ResolvedRequest, resolve
from sdxl_trt.runtime.run import Handoff, Latents, Picture, Run, Step, finish, timed
from sdxl_trt.runtime.samplers import bind_sampler
from sdxl_trt.runtime.sides import StageName


@dataclass
class Job:
    """A request on its way through the stages: its run, where each stage's noise comes from, its latents as they stand.

    `embeds` are the positive and negative ones of each stage, once they are read. Latents are in the sampler's scale.
    """

    run: Run
    noises: dict[StageName, NoiseSource]
    latents: Latents
    embeds: dict[StageName, tuple[PromptEmbeds, PromptEmbeds]] = field(default_factory=dict)


class Pipeline:
    """A bundle ready to generate; a context manager that frees the engines.

    `pictures_at_once` share a call of a UNet where no plan says how many it takes.
    """

    def __init__(self, pool: EnginePool, *, pictures_at_once: int = 4) -> None:
        self.pool = pool
        self.manifest = pool.bundle.manifest
        self._pictures_at_once = pictures_at_once if pool.limits is None else pool.limits.pictures
        self._fewest_at_once = 1 if pool.limits is None else pool.limits.fewest
        self._encoder = PromptEncoder(pool)
        self.run: Run | None = None
        """What the latest request left behind."""

    def generate(self, request: Request) -> Iterator[Picture]:
        """Return an iterator of the pictures of `request`. Raises UsageError before anything is loaded."""
        return (step.picture for step in self.steps(request) if step.picture is not None)

    def steps(self, request: Request) -> Iterator[Step]:
        """Return an iterator of the units of work of `request` as they are done; stop iterating to cancel.

        `run` then belongs to this request. Raises UsageError before anything is loaded.
        """
        job = self.start(request)
        self.run = job.run
        return timed(job.run, self._work(job))

    def start(self, request: Request) -> Job:
        """Return `request` settled, with its noise drawn, ready for the stages. Raises UsageError."""
        resolved = resolve(request, self.manifest, self.pool.limits)
        noises = _noises(resolved)
        initial = _initial_noise(resolved, self.manifest.base.vae, noises["base"])
        run = Run(resolved, initial=initial, final=initial, asked=request)
        return Job(run, noises, resolved.base.noised(np.zeros_like(initial), initial, resolved.schedule))

    def _work(self, job: Job) -> Iterator[Step]:
        yield from self.encode([job])
        yield from self.base(job)
        yield from self.refine(job)
        yield from self.decode(job)

    def encode(self, jobs: Sequence[Job]) -> Iterator[Step]:
        """Read the prompts of all `jobs`, with every encoder loaded once, into their `embeds`."""
        for weighted in (False, True):
            alike = [job for job in jobs if job.run.request.comfyui == weighted]
            wanted = [pair for job in alike for pair in _texts(job.run.request, self._stages(job.run.request))]
            if wanted:
                encoded = iter(self._encoder.encode(wanted, self.manifest.base.unet, weighted=weighted))
            for job in alike:
                job.embeds = _embeds(job.run.request, self._stages(job.run.request), encoded)
                for name, sides in job.embeds.items():
                    self._check_tokens(sides if job.run.request.guidance_of(name).wanted else sides[:1])
        yield Step("encode", 1, 1, slice(0, sum(len(job.latents) for job in jobs)))

    def base(self, job: Job, following: str = "") -> Iterator[Step]:
        """Take `job` over the base's part of the grid; then comes engine `following`, by default what it needs next."""
        request, stage = job.run.request, self.manifest.base
        usual = self.manifest.refiner.unet if self.manifest.refiner and request.refined else stage.vae.decoder
        if request.base.steps:
            yield from self._denoise("base", stage, job, following or usual)

    def refine(self, job: Job, following: str = "") -> Iterator[Step]:
        """Take the latents of `job`, as the base left them, over the refiner's part; nothing for the base alone."""
        request, stage = job.run.request, self.manifest.refiner
        if stage is None or request.refiner is None:
            return
        job.run.handoff, job.run.place = job.latents, _place(request)
        job.latents = _noised_again(job.latents, request.refiner, request, job.noises["refiner"])
        yield from self._denoise("refiner", stage, job, following or stage.vae.decoder)

    def decode(self, job: Job) -> Iterator[Step]:
        """Decode the pictures of `job`, whose latents are as the last expert left them."""
        job.run.final = job.latents * np.float32(job.run.request.final_scale)
        yield from self._decode(self.vae(job.run.request), job.run)

    def vae(self, request: ResolvedRequest) -> Vae:
        """Return the autoencoder that decodes `request`: the refiner's where it runs."""
        return list(self._stages(request).values())[-1].vae

    def _stages(self, request: ResolvedRequest) -> dict[StageName, Stage]:
        base, refiner = self.manifest.base, self.manifest.refiner if request.refined else None
        return {"base": base} if refiner is None else {"base": base, "refiner": refiner}

    def _check_tokens(self, rows: Sequence[PromptEmbeds]) -> None:
        """Raise SizeError for prompts that are longer, once they are equally long, than the plans take."""
        tokens, limits = math.lcm(*(len(row.hidden) for row in rows)), self.pool.limits
        if limits is not None and tokens not in limits.tokens:
            raise SizeError(f"the prompts take {tokens} tokens, the plans {limits.tokens.min} to"
                            f" {limits.tokens.max}; shorten them, or build plans: export-engines --tokens"
                            f" 77:77:{tokens}")  # fmt: skip

    def _denoise(
        self,
        name: StageName,
        stage: Stage,
        job: Job,
        following: str,
    ) -> Iterator[Step]:
        """Take all pictures over one expert's part, writing into their latents; then comes engine `following`."""
        request, latents, embeds, noise = job.run.request, job.latents, job.embeds[name], job.noises[name]
        (engine,) = self.pool.phase(stage.unet, then=(following,))
        yield _loaded(latents)
        guidance = request.guidance_of(name)
        micro = request.sides[name][0].micro, request.sides[name][1].micro
        sampler, part = request.denoising_of(name)
        sigmas = part.sigmas(request.schedule.sigmas)
        groups = _groups(len(latents), self._pictures_at_once)
        for number, group in enumerate(groups):
            pictures = max(len(latents[group]), self._fewest_at_once)
            conditions = make_conditions(
                engine, stage, *embeds, micro, guidance.scale, pictures, any_scale=guidance.any_scale
            )
            denoise = Denoiser(engine, request.schedule, conditions, stage.scheduler.prediction_type, guidance)
            sample = bind_sampler(sampler, noise.source(latents.shape[1:], group), comfyui=request.comfyui)
            for index, x in enumerate(sample(denoise, latents[group], sigmas), start=number * part.steps + 1):
                latents[group] = x
                yield Step(name, index, part.steps * len(groups), group, latents=x)

    def _decode(self, vae: Vae, run: Run) -> Iterator[Step]:
        """Decode one picture at a time: the decoder's activations are the largest of all."""
        (engine,) = self.pool.phase(vae.decoder)
        yield _loaded(run.final)
        count, _, height, width = run.final.shape
        takes = decoder_sizes(self.pool, vae.decoder)
        tile = choose_tile((height, width), takes, vae.factor, tiled=run.request.tile)
        for index in range(count):
            one = slice(index, index + 1)
            sample = decode(engine, vae, run.final[one], tile=tile)
            pixels = (to_uint8_truncated if run.request.comfyui else to_uint8)(sample)[0]
            yield Step("decode", index + 1, count, one, picture=finish(run, index, pixels))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.pool.close()


def open_bundle(
    path: Path | str | None = None, *, provider: str = "auto", residency: str = "auto", available: int | None = None
) -> Pipeline:
    """Open the bundle at `path` (None: the embedded pair). Only the manifest is read; use it in a ``with``.

    `provider`, `residency` and `available`, the bytes to make do with, are those of `open_pool`. Raises SourceError,
    IncompatibleError, CorruptError, UsageError, ResourceError.
    """
    if path is None:
        from sdxl_trt.mini.embedded import bundle_path  # noqa: PLC0415 - package data, only when nothing else is named

        path = bundle_path()
    return Pipeline(open_pool(read_bundle(path), provider, residency, available))


def _texts(request: ResolvedRequest, stages: Mapping[StageName, Stage]) -> Iterator[tuple[Stage, Prompt]]:
    """Yield what the stages have to read: the prompt for each, then the negatives where no zeros stand for them."""
    yield from ((stage, request.sides[name][0].prompt) for name, stage in stages.items())
    negatives = {name: request.sides[name][1] for name in stages}
    yield from ((stages[name], negative.prompt) for name, negative in negatives.items() if not negative.zeroed)


def _embeds(
    request: ResolvedRequest, stages: Mapping[StageName, Stage], encoded: Iterator[PromptEmbeds]
) -> dict[StageName, tuple[PromptEmbeds, PromptEmbeds]]:
    """Return the positive and negative embeds of every stage, from those that were read in the order of `_texts`."""
    positives = {name: next(encoded) for name in stages}
    embeds = {}
    for name, read in positives.items():
        positive, negative = request.sides[name]
        against = read.zeroed() if negative.zeroed else next(encoded)
        embeds[name] = (read.zeroed() if positive.zeroed else read, against)
    return embeds


def _loaded(latents: Latents) -> Step:
    return Step("load", 1, 1, slice(0, len(latents)))


def _groups(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _noises(request: ResolvedRequest) -> dict[StageName, NoiseSource]:
    """Return what each stage draws its noise from; the refiner, without a seed of its own, from the base's."""
    base = _noise(request, request.seeds)
    return {"base": base, "refiner": _noise(request, request.refiner_seeds) if request.refiner_seeds else base}


def _noise(request: ResolvedRequest, seeds: tuple[int, ...]) -> NoiseSource:
    return BatchNoise(seeds[0], len(seeds)) if request.comfyui else PictureNoise(seeds)


def _initial_noise(request: ResolvedRequest, vae: Vae, noise: NoiseSource) -> Latents:
    """Return unit-variance noise, each picture's from a generator of its own, or what the request brought."""
    if request.latents is not None:
        return request.latents
    return noise.draw((vae.latent_channels, request.height // vae.factor, request.width // vae.factor))


def _noised_again(latents: Latents, part: Part, request: ResolvedRequest, noise: NoiseSource) -> Latents:
    """Return the handed-over latents as the refiner starts from them: a copy, with noise where it adds its own."""
    drawn = noise.draw(latents.shape[1:]) if part.add_noise else np.zeros_like(latents)
    return part.noised(latents, drawn, request.schedule)


def _place(request: ResolvedRequest) -> Handoff:
    schedule, cut = request.schedule, request.cut
    return Handoff(cut, float(schedule.timesteps[cut]), float(schedule.sigmas[cut]))
