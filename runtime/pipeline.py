"""Prompt to pictures, read as the list of stages: encode, base, handoff, refiner, decode.

A request runs phase-major: all prompts are encoded, all pictures take their base steps, the experts change once,
all pictures take their refiner steps, all are decoded. Each phase tells the pool what the next one needs.
"""

__all__ = ["Handoff", "Picture", "Pipeline", "Run", "Step", "open_bundle"]

import math
from collections.abc import Iterator, Mapping, Sequence
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
from sdxl_trt.runtime.prompts import PromptEmbeds, PromptEncoder
from sdxl_trt.runtime.request import Request, ResolvedRequest, resolve
from sdxl_trt.runtime.run import Handoff, Latents, Picture, Run, Step, finish, timed
from sdxl_trt.runtime.samplers import bind_sampler
from sdxl_trt.runtime.sides import StageName


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
        resolved = resolve(request, self.manifest, self.pool.limits)
        noises = _noises(resolved)
        initial = _initial_noise(resolved, self.manifest.base.vae, noises["base"])
        self.run = Run(resolved, initial=initial, final=initial)
        return timed(self.run, self._work(self.run, noises))

    def _work(self, run: Run, noises: Mapping[StageName, NoiseSource]) -> Iterator[Step]:
        request = run.request
        base, refiner = self.manifest.base, self.manifest.refiner if request.refined else None
        vae = (refiner or base).vae
        stages: dict[StageName, Stage] = {"base": base} if refiner is None else {"base": base, "refiner": refiner}
        embeds = self._encode(stages, request)
        yield Step("encode", 1, 1, slice(0, len(request.seeds)))

        latents = request.base.noised(np.zeros_like(run.initial), run.initial, request.schedule)
        if request.base.steps:
            following = vae.decoder if refiner is None else refiner.unet
            yield from self._denoise("base", base, embeds["base"], latents, request, noises["base"], following)
        if refiner is not None and request.refiner is not None:
            run.handoff, run.place = latents, _place(request)
            latents = _noised_again(latents, request.refiner, request, noises["refiner"])
            yield from self._denoise(
                "refiner", refiner, embeds["refiner"], latents, request, noises["refiner"], vae.decoder
            )
        run.final = latents * np.float32(request.final_scale)
        yield from self._decode(vae, run)

    def _encode(
        self, stages: Mapping[StageName, Stage], request: ResolvedRequest
    ) -> dict[StageName, tuple[PromptEmbeds, PromptEmbeds]]:
        """Return the positive and negative embeds of every stage."""
        sides = {name: request.sides[name] for name in stages}
        wanted = [(stages[name], positive.prompt) for name, (positive, _) in sides.items()]
        wanted += [(stages[name], negative.prompt) for name, (_, negative) in sides.items() if not negative.zeroed]
        encoded = iter(self._encoder.encode(wanted, stages["base"].unet, weighted=request.comfyui))
        positives = {name: next(encoded) for name in stages}
        embeds = {}
        for name, (positive, negative) in sides.items():
            read = positives[name]
            against = read.zeroed() if negative.zeroed else next(encoded)
            embeds[name] = (read.zeroed() if positive.zeroed else read, against)
            self._check_tokens(embeds[name] if request.guidance_of(name).wanted else embeds[name][:1])
        return embeds

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
        embeds: tuple[PromptEmbeds, PromptEmbeds],
        latents: Latents,
        request: ResolvedRequest,
        noise: NoiseSource,
        following: str,
    ) -> Iterator[Step]:
        """Take all pictures over one expert's part, writing into `latents`; then comes engine `following`."""
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
