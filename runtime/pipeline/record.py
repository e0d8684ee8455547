"""A finished run's pictures, each with the metadata it can be made again from."""

__all__ = ["finish"]


import json
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from sdxl_trt.runtime.comfyui import write_workflow
from sdxl_trt.runtime.images import Picture, bundle_name
from sdxl_trt.runtime.pipeline.run import Run
from sdxl_trt.runtime.request import Request, ResolvedRequest

FURTHER = (
    "compat", "original_size", "crop", "target_size", "clip_skip", "base_end_step", "refiner_start_step",
    "refiner_add_noise", "leftover_noise", "prediction_type",
)  # fmt: skip
OF_WORKFLOWS = (
    "base_start_step", "base_add_noise", "refiner_end_step", "refiner_leftover_noise", "base_sides", "refiner_sides",
    "refiner_seed", "refiner_strength",
)  # fmt: skip


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
    refined = request.uses_refiner
    positive, negative = request.sides["refiner" if refined else "base"]
    return {
        "prompt": request.prompt.text,
        "prompt_2": request.prompt.text_2,
        "negative": request.negative.text if request.negative else None,
        "negative_2": request.negative.text_2 if request.negative else None,
        "seed": seed,
        "steps": request.steps,
        "handoff_step": request.cut if refined and not request.refiner_only else None,
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
    return image | {"fit": request.fit} | ({"refine": True} if request.refiner_only else {})


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
        found["bundle"] = msgspec.to_builtins(bundle_name(run.manifest, refined=run.request.uses_refiner))
    return found
