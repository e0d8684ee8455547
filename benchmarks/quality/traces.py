"""The intermediate results of a base and refiner run at every stage, for comparing two implementations."""

__all__ = ["Trace", "TraceCase", "make_cases", "tiled_pixels", "trace_engines"]

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.benchmarks.report import BenchSettings
from sdxl_trt.engines.bundle import Vae
from sdxl_trt.runtime import Pipeline, Request
from sdxl_trt.runtime.diffusion.noise import PictureNoise
from sdxl_trt.runtime.pipeline import Job, Step
from sdxl_trt.runtime.vae import Size, choose_tile, decode_latents, decoder_sizes, to_uint8

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class TraceCase:
    """A prompt, and the unit-variance noise (1, c, h/8, w/8) that every implementation starts from."""

    prompt: str
    noise: Floats


@dataclass(frozen=True)
class Trace:
    """A picture and the tensors it was made from.

    `embeddings` are each stage's prompt embeddings by name: "base hidden" (tokens, width), "base pooled" (width), the
    same for the negative prompt (only with guidance) and for the refiner. Latents (c, h, w) are in diffusers' scale;
    `handoff` is None for the base alone. `pixels` are (h, w, 3).
    """

    embeddings: dict[str, Floats]
    handoff: Floats | None
    final: Floats
    pixels: Pixels


def make_cases(prompts: Sequence[str], seeds: Sequence[int], settings: BenchSettings, vae: Vae) -> list[TraceCase]:
    """Return a case for every prompt with its seed, at the size of `settings`."""
    shape = (vae.latent_channels, settings.height // vae.factor, settings.width // vae.factor)
    return [TraceCase(prompt, PictureNoise([seed]).draw(shape)) for prompt, seed in zip(prompts, seeds, strict=True)]


def trace_engines(pipeline: Pipeline, cases: Sequence[TraceCase], settings: BenchSettings) -> list[Trace]:
    """Return the traces of `pipeline` for all cases, run phase by phase: the UNet changes once for all."""
    jobs = [pipeline.start(_request(case, settings)) for case in cases]
    manifest = pipeline.manifest
    _drain(pipeline.encode(jobs))
    for job in jobs:
        _drain(pipeline.base(job, "" if job is jobs[-1] else manifest.base.unet))
    for job in jobs if manifest.refiner else ():
        _drain(pipeline.refine(job, "" if job is jobs[-1] else manifest.refiner.unet))  # type: ignore[union-attr]
    return [_trace(job, list(pipeline.decode(job)), guided=settings.guidance > 1) for job in jobs]


def tiled_pixels(pipeline: Pipeline, traces: Sequence[Trace]) -> tuple[Size, list[Pixels]] | None:
    """Decode the latents of `traces` in tiles; return the tile (height, width) in pixels, and the pictures (h, w, 3).

    The tile is that of ``--tile``, or a quarter of a picture that fits one tile. None if plans take no smaller tile.
    """
    vae = (
        pipeline.manifest.base if traces[0].handoff is None else pipeline.manifest.refiner or pipeline.manifest.base
    ).vae
    high, wide = traces[0].final.shape[1:]
    takes = decoder_sizes(pipeline.pool, vae.decoder)
    tile = choose_tile((high, wide), takes, vae.factor, tiled=True)
    if tile is None and takes is None:
        tile = (-(-high // 2), -(-wide // 2))
    if tile is None:
        return None
    (engine,) = pipeline.pool.phase(vae.decoder)
    pictures = [to_uint8(decode_latents(engine, vae, trace.final[None], tile=tile))[0] for trace in traces]
    return (tile[0] * vae.factor, tile[1] * vae.factor), pictures


def _request(case: TraceCase, settings: BenchSettings) -> Request:
    return Request(
        case.prompt,
        steps=settings.steps,
        handoff=settings.handoff,
        guidance=settings.guidance,
        width=settings.width,
        height=settings.height,
        latents=case.noise,
        seed=settings.seed,
    )


def _trace(job: Job, decoded: list[Step], *, guided: bool) -> Trace:
    embeddings: dict[str, Floats] = {}
    for stage, sides in job.embeds.items():
        for side, (embeds,) in zip(("", " negative"), sides[: 1 + guided], strict=False):
            embeddings |= {f"{stage}{side} hidden": embeds.hidden, f"{stage}{side} pooled": embeds.pooled}
    picture = decoded[-1].picture
    assert picture is not None  # noqa: S101 - decoding ends with a picture
    handoff = None if job.run.handoff_latents is None else job.run.handoff_latents[0]
    return Trace(embeddings, handoff, job.run.final[0], np.asarray(picture.image))


def _drain(steps: Iterator[Step]) -> None:
    deque(steps, maxlen=0)
