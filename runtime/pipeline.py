"""Prompt to pictures, read as the list of stages: encode, base, handoff, refiner, decode.

A request runs phase-major: all prompts are encoded, all pictures take their base steps, the experts change once,
all pictures take their refiner steps, all are decoded.
"""

__all__ = ["Handoff", "Picture", "Pipeline", "Run", "Step", "open_bundle"]

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines.base import Engine, numpy_dtype
from sdxl_trt.engines.bundle import Stage, Vae, read_bundle
from sdxl_trt.engines.errors import CorruptError
from sdxl_trt.engines.pool import EnginePool, open_pool
from sdxl_trt.runtime.conditioning import make_conditions
from sdxl_trt.runtime.denoiser import Denoiser
from sdxl_trt.runtime.handoff import split
from sdxl_trt.runtime.images import save_png, to_uint8
from sdxl_trt.runtime.noise import TorchGenerator
from sdxl_trt.runtime.prompts import Prompt, PromptEmbeds, PromptEncoder
from sdxl_trt.runtime.request import Request, ResolvedRequest, resolve
from sdxl_trt.runtime.samplers import SAMPLERS

if TYPE_CHECKING:
    from PIL.Image import Image

Latents = NDArray[np.float32]
StageName = Literal["encode", "load", "base", "refiner", "decode"]
METADATA_KEY = "sdxl-trt"


@dataclass(frozen=True)
class Step:
    """One unit of work done: prompts encoded, an engine loaded, a sampler step of a group, a picture decoded.

    `index` counts from 1 to `total` within `stage` over all pictures; `seconds` is what this unit took. After a
    sampler step `latents` are those of the pictures `pictures` (yours to keep); after a decode `picture` is
    the finished one. Elsewhere both are None.
    """

    stage: StageName
    index: int
    total: int
    pictures: slice
    seconds: float
    latents: Latents | None = None
    picture: "Picture | None" = None


@dataclass(frozen=True)
class Handoff:
    """Where the latents changed hands: after `step` steps, the refiner starting at `timestep` and `sigma`."""

    step: int
    timestep: float
    sigma: float


@dataclass
class Run:
    """What a request left behind: latents (count, c, h, w) float32 and the seconds of every stage and step.

    `initial` has unit variance; `handoff` is what the refiner received (None without a refiner); `final` is what
    the autoencoder received, before its scaling is undone.
    """

    request: ResolvedRequest
    initial: Latents
    final: Latents
    handoff: Latents | None = None
    place: Handoff | None = None
    timings: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """A finished picture; `image` (a Pillow image) and `latents` (c, h, w) belong to the caller."""

    image: "Image"
    seed: int
    metadata: Mapping[str, Any]
    latents: Latents

    def save(self, path: Path | str, *, metadata: bool = True) -> None:
        """Write a PNG, atomically; with `metadata`, a text chunk holds what the run can be repeated from."""
        texts = {METADATA_KEY: json.dumps(self.metadata)} if metadata else {}
        save_png(self.image, Path(path), texts)


class Pipeline:
    """A bundle ready to generate; a context manager that frees the engines."""

    def __init__(self, pool: EnginePool, *, pictures_at_once: int = 4) -> None:
        self.pool = pool
        self.manifest = pool.bundle.manifest
        self._pictures_at_once = pictures_at_once
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
        resolved = resolve(request, self.manifest)
        noise = _initial_noise(resolved, self.manifest.base.vae)
        self.run = Run(resolved, initial=noise, final=noise)
        return _timed(self.run, self._work(self.run))

    def _work(self, run: Run) -> Iterator[Step]:
        request = run.request
        stages = {"base": self.manifest.base}
        if request.refined and self.manifest.refiner is not None:
            stages["refiner"] = self.manifest.refiner
        embeds = self._encode(stages, request)
        yield Step("encode", 1, 1, slice(0, len(request.seeds)), 0.0)

        before, after = split(request.schedule.sigmas, request.cut)
        latents = run.initial * np.float32(request.schedule.initial_scale)
        yield from self._denoise("base", stages["base"], embeds["base"], before, latents, request)
        refiner = stages.get("refiner")
        if refiner is not None:
            run.handoff = latents.copy()
            run.place = _place(request)
            yield from self._denoise("refiner", refiner, embeds["refiner"], after, latents, request)
        run.final = latents
        yield from self._decode((refiner or stages["base"]).vae, run)

    def _encode(
        self, stages: Mapping[str, Stage], request: ResolvedRequest
    ) -> dict[str, tuple[PromptEmbeds, PromptEmbeds]]:
        """Return the positive and negative embeds of every stage."""
        absent = request.negative is None
        negative = request.negative or Prompt("", "")
        zeroed = {name: absent and stage.force_zeros_for_empty_prompt for name, stage in stages.items()}
        wanted = [(stage, request.prompt) for stage in stages.values()]
        wanted += [(stage, negative) for name, stage in stages.items() if not zeroed[name]]
        encoded = iter(self._encoder.encode(wanted))
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
    ) -> Iterator[Step]:
        """Take all pictures over `sigmas` with one expert, writing into `latents`."""
        (engine,) = self.pool.phase(stage.unet)
        yield _loaded(latents)
        guidance = request.guidance if name == "base" else request.refiner_guidance
        groups = _groups(len(latents), self._pictures_at_once)
        steps = len(sigmas) - 1
        for number, group in enumerate(groups):
            pictures = len(latents[group])
            conditions = make_conditions(engine, stage, *embeds, request.micro, guidance, pictures)
            denoise = Denoiser(engine, request.schedule, conditions, stage.scheduler.prediction_type)
            sampled = SAMPLERS[request.sampler](denoise, latents[group], sigmas)
            for index, x in enumerate(sampled, start=number * steps + 1):
                latents[group] = x
                yield Step(name, index, steps * len(groups), group, 0.0, latents=x)

    def _decode(self, vae: Vae, run: Run) -> Iterator[Step]:
        """Decode one picture at a time: the decoder's activations are the largest of all."""
        (engine,) = self.pool.phase(vae.decoder)
        yield _loaded(run.final)
        count = len(run.final)
        for index in range(count):
            one = slice(index, index + 1)
            picture = _picture(run, index, to_uint8(_decode_one(engine, vae, run.final[one]))[0])
            yield Step("decode", index + 1, count, one, 0.0, picture=picture)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.pool.free()


def open_bundle(path: Path | str | None = None, *, provider: str = "auto", residency: str = "auto") -> Pipeline:
    """Open the bundle at `path` (None: the embedded pair). Only the manifest is read; use it in a ``with``.

    `provider` is "auto" or "ort-cpu"; `residency` is "auto", "resident" or "swap". Raises SourceError,
    IncompatibleError, CorruptError, UsageError.
    """
    if path is None:
        from sdxl_trt.mini.embedded import bundle_path  # noqa: PLC0415 - package data, only when nothing else is named

        path = bundle_path()
    return Pipeline(open_pool(read_bundle(path), provider, residency))


def _timed(run: Run, work: Iterator[Step]) -> Iterator[Step]:
    """Yield the steps of `work` with their seconds, which the time a caller spends between them is not part of."""
    started = time.perf_counter()
    for step in work:
        seconds = time.perf_counter() - started
        run.timings.setdefault(step.stage, []).append(seconds)
        yield replace(step, seconds=seconds)
        started = time.perf_counter()


def _loaded(latents: Latents) -> Step:
    return Step("load", 1, 1, slice(0, len(latents)), 0.0)


def _picture(run: Run, index: int, pixels: NDArray[np.uint8]) -> Picture:
    from PIL import Image  # noqa: PLC0415 - Pillow is loaded with the first picture

    seed = run.request.seeds[index]
    return Picture(Image.fromarray(pixels), seed, _metadata(run, seed), run.final[index])


def _groups(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _initial_noise(request: ResolvedRequest, vae: Vae) -> Latents:
    """Return unit-variance noise, each picture's from a generator of its own, or what the request brought."""
    if request.latents is not None:
        return request.latents
    shape = (1, vae.latent_channels, request.height // vae.factor, request.width // vae.factor)
    return np.concatenate([TorchGenerator(seed).randn(shape) for seed in request.seeds])


def _place(request: ResolvedRequest) -> Handoff:
    schedule, cut = request.schedule, request.cut
    return Handoff(cut, float(schedule.timesteps[cut]), float(schedule.sigmas[cut]))


def _decode_one(engine: Engine, vae: Vae, latents: Latents) -> NDArray[Any]:
    scaled = latents / np.float32(vae.scaling_factor)
    if vae.latents_mean is not None and vae.latents_std is not None:
        mean, std = (np.array(v, np.float32).reshape(1, -1, 1, 1) for v in (vae.latents_mean, vae.latents_std))
        scaled = scaled * std + mean
    dtype = numpy_dtype(engine.component.input("latent_sample"))
    sample = engine.infer({"latent_sample": scaled.astype(dtype)})["sample"]
    if not np.isfinite(sample).all():
        raise CorruptError("the autoencoder answered with NaN or infinity, which would be a black picture; export the"
                           " bundle with --vae-precision fp32")  # fmt: skip
    return sample


def _metadata(run: Run, seed: int) -> dict[str, Any]:
    """Return what the picture can be made again from; no path and no name of a host."""
    request = run.request
    refined = request.refined
    return {
        "prompt": request.prompt.text,
        "prompt_2": request.prompt.text_2,
        "negative": request.negative.text if request.negative else None,
        "negative_2": request.negative.text_2 if request.negative else None,
        "seed": seed,
        "steps": request.steps,
        "handoff_step": request.cut if refined else None,
        "guidance": request.guidance,
        "refiner_guidance": request.refiner_guidance if refined else None,
        "sampler": request.sampler,
        "width": request.width,
        "height": request.height,
        "aesthetic_score": request.aesthetic_score if refined else None,
        "negative_aesthetic_score": request.negative_aesthetic_score if refined else None,
        "injected_latents": request.latents is not None,
    }
