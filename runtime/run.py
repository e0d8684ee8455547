"""What a request does and leaves behind: its steps, its latents and timings, its pictures and their metadata."""

__all__ = ["Handoff", "Latents", "Picture", "Run", "StageName", "Step", "finish", "timed"]

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines.bundle.manifest import Manifest
from sdxl_trt.runtime.metadata import describe
from sdxl_trt.runtime.picture_files import save_image
from sdxl_trt.runtime.provenance import bundle_name
from sdxl_trt.runtime.request import Request, ResolvedRequest
from sdxl_trt.runtime.workflow_writer import write_workflow

if TYPE_CHECKING:
    from PIL.Image import Image

Latents = NDArray[np.float32]
StageName = Literal["picture", "encode", "load", "base", "refiner", "decode"]

FURTHER = (
    "compat", "original_size", "crop", "target_size", "clip_skip", "base_end_step", "refiner_start_step",
    "refiner_add_noise", "leftover_noise", "prediction_type",
)  # fmt: skip
OF_WORKFLOWS = (
    "base_start_step", "base_add_noise", "refiner_end_step", "refiner_leftover_noise", "base_sides", "refiner_sides",
    "refiner_seed", "refiner_strength",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One unit of work done: prompts or an image encoded, an engine loaded, a step of a group, a picture decoded.

    `index` counts from 1 to `total` within `stage` over all pictures; `seconds` is what this unit took. After a
    sampler step `latents` are those of the pictures `pictures` (a copy: yours to keep and to change), and `denoised` is
    what they are estimated to come to (yours to keep, but read-only: the sampler may go on from it); after a decode
    `picture` is the finished one. Elsewhere all are None.
    """

    stage: StageName
    index: int
    total: int
    pictures: slice
    seconds: float = 0.0
    latents: Latents | None = None
    picture: "Picture | None" = None
    denoised: Latents | None = None


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
    asked: Request = field(default_factory=Request)
    """The request before its defaults were settled."""
    manifest: Manifest | None = None
    """That of the bundle, which the pictures name; None where nobody asks."""


@dataclass(frozen=True)
class Picture:
    """A finished picture; `image` (a Pillow image) and `latents` (c, h, w) belong to the caller.

    `graph` is a ComfyUI graph that makes it, if there is one.
    """

    image: "Image"
    seed: int
    metadata: Mapping[str, Any]
    latents: Latents
    graph: Mapping[str, Any] | None = None

    def save(self, path: Path | str, *, metadata: bool = True, replace: bool = True) -> None:
        """Write a picture file, atomically, in the format that the name's ending says: PNG, JPEG or WebP.

        With `metadata` it holds what the run can be repeated from. Raises UsageError for another ending, and without
        `replace` FileExistsError where the file is there.
        """
        texts = describe(self.metadata, self.graph) if metadata else {}
        save_image(self.image, Path(path), texts, replace=replace)


def timed(run: Run, work: Iterator[Step]) -> Iterator[Step]:
    """Yield the steps of `work` with their seconds, which the time a caller spends between them is not part of."""
    started = time.perf_counter()
    for step in work:
        seconds = time.perf_counter() - started
        run.timings.setdefault(step.stage, []).append(seconds)
        yield replace(step, seconds=seconds)
        started = time.perf_counter()


def finish(run: Run, index: int, pixels: NDArray[np.uint8]) -> Picture:
    """Return picture `index` of `run` from its pixels (h, w, 3)."""
    from PIL import Image  # noqa: PLC0415 - Pillow is loaded with the first picture

    seed = run.request.seeds[index]
    metadata = _metadata(run.request, seed) | _further(run)
    return Picture(Image.fromarray(pixels), seed, metadata, run.final[index].copy(), _graph(run))


def _graph(run: Run) -> Mapping[str, Any] | None:
    """Return the ComfyUI graph of a run: the one that asked for it, or one that is written for it."""
    if run.asked.graph:
        graph: dict[str, Any] = json.loads(run.asked.graph)
        return graph
    return None if run.manifest is None else write_workflow(run.asked, run.request, run.manifest)


def _metadata(request: ResolvedRequest, seed: int) -> dict[str, Any]:
    """Return what the picture can be made again from; no path and no name of a host."""
    refined = request.refined
    positive, negative = request.sides["refiner" if refined else "base"]
    return {
        "prompt": request.prompt.text,
        "prompt_2": request.prompt.text_2,
        "negative": request.negative.text if request.negative else None,
        "negative_2": request.negative.text_2 if request.negative else None,
        "seed": seed,
        "steps": request.steps,
        "handoff_step": request.cut if refined and not request.refine else None,
        "guidance": request.guidance,
        "refiner_guidance": request.refiner_guidance if refined else None,
        "guidance_rescale": request.guidance_rescale,
        "guidance_interval": request.guidance_interval,
        "sampler": request.sampler,
        "refiner_sampler": request.refiner_sampler if refined else None,
        "schedule": request.spacing,
        "width": request.width,
        "height": request.height,
        "aesthetic_score": positive.micro.aesthetic_score if refined else None,
        "negative_aesthetic_score": negative.micro.negative_aesthetic_score if refined else None,
        "tile": request.tile,
        "injected_latents": request.latents is not None,
    } | _started_from(request)


def _started_from(request: ResolvedRequest) -> dict[str, Any]:
    """Return what an image has to do with it: its file's name, which names no folder, and what that held."""
    if request.image is None:
        return {}
    image = {"image": request.image.name, "image_sha256": request.image.sha256, "strength": request.strength}
    return image | {"fit": request.fit} | ({"refine": True} if request.refine else {})


def _further(run: Run) -> dict[str, Any]:
    """Return what else was asked for, where it is not the usual; a workflow asks for more than can be told."""
    usual = Request()

    def changed(names: tuple[str, ...]) -> dict[str, Any]:
        return {name: getattr(run.asked, name) for name in names if getattr(run.asked, name) != getattr(usual, name)}

    found = changed(FURTHER)
    if changed(OF_WORKFLOWS):
        found["workflow"] = True
    if run.request.comfyui and len(run.request.seeds) > 1:
        # Pictures of one batch share a stream of noise: they are made again together.
        found["count"] = len(run.request.seeds)
    if run.manifest is not None:
        found["bundle"] = msgspec.to_builtins(bundle_name(run.manifest, refined=run.request.refined))
    return found
