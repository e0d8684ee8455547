"""Which requests can share the calls of a UNet: what must be equal, by the table of pairs and by the steps."""

__all__ = ["Key", "differing", "share_key"]

from collections.abc import Callable, Hashable, Mapping

from sdxl_trt.runtime.pairs import PAIRS, SHARED
from sdxl_trt.runtime.request import ResolvedRequest, StageName

Key = tuple[tuple[str, Hashable], ...]
"""Names of what must be equal, each with its value."""

FEATURES_IN_KEY: Mapping[str, Callable[[ResolvedRequest, StageName], Hashable]] = {
    "LoRA": lambda request, stage: tuple(request.loras.get(stage, ())),
    "ControlNet": lambda request, stage: stage == "base" and len(request.controls),
    "refine": lambda request, _: request.refiner_only,
    "step cache": lambda request, stage: request.cache_of(stage) is not None,
}
"""The value that a stage of a request has of each feature that is not free by row; a false one does not use it."""


def share_key(request: ResolvedRequest, stage: StageName) -> Key | None:
    """Return what must be equal for requests to share the calls of a stage's UNet; None if this one runs alone.

    Requests with equal keys share them: prompts, seeds, scales, scores, guided intervals, masks and prediction types
    differ by row. Lengths of prompts are known only when they are encoded: `Shared` gives each length calls of its own.
    """
    values = {feature: value(request, stage) for feature, value in FEATURES_IN_KEY.items()}
    if any(value and PAIRS[SHARED, feature].sharing == "alone" for feature, value in values.items()):
        return None
    equal = {feature: value for feature, value in values.items() if PAIRS[SHARED, feature].sharing == "equal"}
    return tuple({**_steps(request, stage), **equal}.items())


def _steps(request: ResolvedRequest, stage: StageName) -> dict[str, Hashable]:
    sampler, part = request.denoising_of(stage)
    schedule = request.schedule_of(stage)
    return {
        "expert": stage,
        "height": request.height,
        "width": request.width,
        "steps": (part.start, part.stop, schedule.steps),
        "sampler": (sampler, request.comfyui),
        "schedule": schedule.sigmas.tobytes(),
        "handoff": (request.cut, request.uses_refiner, part.leftover_noise),
        "guidance": request.guidance_of(stage).wanted,
    }


def differing(one: Key, other: Key) -> str:
    """Return the name of the first thing that differs between two keys, "" if they are equal."""
    return next((name for (name, value), (_, its) in zip(one, other, strict=True) if value != its), "")
