"""Prompt to pictures, read as the list of stages: encode, base, handoff, refiner, decode.

A request runs phase-major: all prompts are encoded, all pictures take their base steps, the experts change once,
all pictures take their refiner steps, all are decoded. Each phase tells the pool what the next one needs.
"""

__all__ = ["Handoff", "Picture", "Pipeline", "Run", "Step", "open_bundle"]

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines.bundle import read_bundle
from sdxl_trt.engines.manifest import Stage, Vae
from sdxl_trt.engines.pool import EnginePool, open_pool
from sdxl_trt.runtime.conditioning import make_conditions
from sdxl_trt.runtime.decode import choose_tile, decode, decoder_sizes
from sdxl_trt.runtime.denoiser import Denoiser
from sdxl_trt.runtime.handoff import split
from sdxl_trt.runtime.images import to_uint8
from sdxl_trt.runtime.noise import PictureNoise
from sdxl_trt.runtime.prompts import Prompt, PromptEmbeds, PromptEncoder
from sdxl_trt.runtime.request import Request, ResolvedRequest, resolve
from sdxl_trt.runtime.run import Handoff, Latents, Picture, Run, Step, finish, timed
from sdxl_trt.runtime.samplers import bind_sampler


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
        noise = PictureNoise(resolved.seeds)
        initial = _initial_noise(resolved, self.manifest.base.vae, noise)
        self.run = Run(resolved, initial=initial, final=initial)
        return timed(self.run, self._work(self.run, noise))

    def _work(self, run: Run, noise: PictureNoise) -> Iterator[Step]:
        request = run.request
        base, refiner = self.manifest.base, self.manifest.refiner if request.refined else None
        vae = (refiner or base).vae
        stages = {"base": base} if refiner is None else {"base": base, "refiner": refiner}
        embeds = self._encode(stages, request)
        yield Step("encode", 1, 1, slice(0, len(request.seeds)))

        before, after = split(request.schedule.sigmas, request.cut)
        latents = run.initial * np.float32(request.schedule.initial_scale)
        following = vae.decoder if refiner is None else refiner.unet
        yield from self._denoise("base", base, embeds["base"], before, latents, request, noise, following)
        if refiner is not None:
            run.handoff = latents.copy()
            run.place = _place(request)
            yield from self._denoise("refiner", refiner, embeds["refiner"], after, latents, request, noise, vae.decoder)
        run.final = latents * np.float32(request.schedule.final_scale)
        yield from self._decode(vae, run)

    def _encode(
        self, stages: Mapping[str, Stage], request: ResolvedRequest
    ) -> dict[str, tuple[PromptEmbeds, PromptEmbeds]]:
        """Return the positive and negative embeds of every stage."""
        absent = request.negative is None
        negative = request.negative or Prompt("", "")
        zeroed = {name: absent and stage.force_zeros_for_empty_prompt for name, stage in stages.items()}
        wanted = [(stage, request.prompt) for stage in stages.values()]
        wanted += [(stage, negative) for name, stage in stages.items() if not zeroed[name]]
        encoded = iter(self._encoder.encode(wanted, following=stages["base"].unet))
        positives = {name: next(encoded) for name in stages}
        return {
            name: (positive, positive.zeroed() if zeroed[name] else next(encoded))
            for name, positive in positives.items()
        }

    def _denoise(
        self,
        name: Literal["base", "refiner"],
        stage: Stage,
        embeds: tuple[PromptEmbeds, PromptEmbeds],
        sigmas: NDArray[np.float32],
        latents: Latents,
        request: ResolvedRequest,
        noise: PictureNoise,
        following: str,
    ) -> Iterator[Step]:
        """Take all pictures over `sigmas` with one expert, writing into `latents`; then comes engine `following`."""
        (engine,) = self.pool.phase(stage.unet, then=(following,))
        yield _loaded(latents)
        guidance = request.guidance_of(name)
        sampler = request.sampler if name == "base" else request.refiner_sampler
        groups = _groups(len(latents), self._pictures_at_once)
        steps = len(sigmas) - 1
        for number, group in enumerate(groups):
            pictures = max(len(latents[group]), self._fewest_at_once)
            conditions = make_conditions(engine, stage, *embeds, request.micro, guidance.scale, pictures)
            denoise = Denoiser(engine, request.schedule, conditions, stage.scheduler.prediction_type, guidance)
            sample = bind_sampler(sampler, noise.source(latents.shape[1:], group))
            for index, x in enumerate(sample(denoise, latents[group], sigmas), start=number * steps + 1):
                latents[group] = x
                yield Step(name, index, steps * len(groups), group, latents=x)

    def _decode(self, vae: Vae, run: Run) -> Iterator[Step]:
        """Decode one picture at a time: the decoder's activations are the largest of all."""
        (engine,) = self.pool.phase(vae.decoder)
        yield _loaded(run.final)
        count, _, height, width = run.final.shape
        takes = decoder_sizes(self.pool, vae.decoder)
        tile = choose_tile((height, width), takes, vae.factor, tiled=run.request.tile)
        for index in range(count):
            one = slice(index, index + 1)
            pixels = to_uint8(decode(engine, vae, run.final[one], tile=tile))[0]
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


def _initial_noise(request: ResolvedRequest, vae: Vae, noise: PictureNoise) -> Latents:
    """Return unit-variance noise, each picture's from a generator of its own, or what the request brought."""
    if request.latents is not None:
        return request.latents
    return noise.draw((vae.latent_channels, request.height // vae.factor, request.width // vae.factor))


def _place(request: ResolvedRequest) -> Handoff:
    schedule, cut = request.schedule, request.cut
    return Handoff(cut, float(schedule.timesteps[cut]), float(schedule.sigmas[cut]))
