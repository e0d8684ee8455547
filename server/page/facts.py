"""What the page may offer: sizes, names and usual values, of the bundle that is served and the runtime's own tables."""

__all__ = ["facts", "steps_of"]

from collections.abc import Mapping
from typing import Any

import numpy as np

from sdxl_trt.engines.bundle import Manifest
from sdxl_trt.engines.host import __version__
from sdxl_trt.engines.plans import PlanLimits
from sdxl_trt.runtime import Request
from sdxl_trt.runtime.adapters import names_in
from sdxl_trt.runtime.diffusion.samplers import sampler_names
from sdxl_trt.runtime.diffusion.schedules import SPACINGS, TRANSFORMS
from sdxl_trt.runtime.request import DEFAULT_HANDOFF, MAX_SEED, resolve_request, settings_of, step_at_fraction
from sdxl_trt.server.openai.body import (
    DEFAULT_STRENGTH,
    MOST_GUIDANCE,
    MOST_PARTIALS,
    MOST_PROMPT,
    Sizes,
    Start,
    read_asked,
    told,
    translate,
)
from sdxl_trt.server.options import Options

SHAPES = ((1, 1), (4, 3), (3, 2), (16, 9), (3, 4), (2, 3), (9, 16))
"""Width and height of the shapes that the page offers, in the usual area."""
SCORES = (0.0, 10.0)
"""What the page's slider covers: people rated the pictures of the training from 1 to 10."""
FRACTIONS = tuple(percent / 100 for percent in range(1, 100))
"""The places of the page's handoff slider."""
ASKED = ("steps", "sampler", "scheduler", "strength")
"""The fields of a request that decide how many steps each expert takes, besides the handoff."""


def facts(manifest: Manifest, limits: PlanLimits | None, options: Options) -> dict[str, Any]:
    """Return what the page offers, as JSON. Raises UsageError if the folder of LoRAs cannot be read."""
    usual, refined = Request(), manifest.refiner is not None
    sizes = Sizes.of(manifest, limits, options.max_pixels, refined=refined)
    names = {stage: _name(manifest, stage) for stage in manifest.stages()}
    return {
        "version": __version__,
        "embedded": options.engines is None,
        "models": {"base": names["base"], "refiner": names.get("refiner")},
        "prompt": {"most": MOST_PROMPT},
        "sizes": _sizes(sizes),
        "steps": {"usual": usual.steps, "low": settings_of(Request)["steps"].low,
                  "high": manifest.base.scheduler.num_train_timesteps},
        "seed": {"high": str(MAX_SEED)},
        "handoff": {"usual": DEFAULT_HANDOFF, "low": FRACTIONS[0], "high": FRACTIONS[-1]} if refined else None,
        "guidance": {"usual": usual.guidance, "low": 0.0, "high": MOST_GUIDANCE},
        "score": _score(manifest, usual),
        "strength": {"usual": DEFAULT_STRENGTH},
        "samplers": {"usual": manifest.base.scheduler.sampler, "choices": sampler_names()},
        "schedules": {"choices": _schedules()},
        "loras": [] if options.lora_dir is None else names_in(options.lora_dir, "--lora-dir"),
        "partials": MOST_PARTIALS,
        "upload": {"bytes": options.max_body, "pixels": options.max_pixels},
    }  # fmt: skip


def _name(manifest: Manifest, stage: str) -> str:
    """Return where the weights of a stage came from: the name of a repository, a folder or a file, never a path."""
    source = manifest.components[manifest.stages()[stage].unet].source.name.removesuffix("/unet")
    return source.replace("\\", "/").rstrip("/").rpartition("/")[2]


def _sizes(sizes: Sizes) -> dict[str, Any]:
    """Return the sizes to offer: those of the usual area, and the rule for others. Sides are [height, width]."""
    area = sizes.usual[0] * sizes.usual[1]
    shaped = (((area * h / w) ** 0.5, (area * w / h) ** 0.5) for w, h in SHAPES)
    near = [sizes.nearest((round(height), round(width))) for height, width in shaped]
    choices = dict.fromkeys(told(size) for size in (sizes.usual, *near) if sizes.takes(size))
    return {"usual": told(sizes.usual), "choices": [*choices], "multiple": sizes.multiple, "low": sizes.low,
            "high": sizes.high, "pixels": sizes.pixels}  # fmt: skip


def _score(manifest: Manifest, usual: Request) -> dict[str, float] | None:
    """Return the usual aesthetic scores; None if no expert reads them."""
    if not any("aesthetic_score" in stage.time_ids for stage in manifest.stages().values()):
        return None
    return {"usual": usual.aesthetic_score, "negative": usual.negative_aesthetic_score, "low": SCORES[0],
            "high": SCORES[1]}  # fmt: skip


def _schedules() -> list[str]:
    """Return the names of diffusers' schedules: each spacing, alone and with each transform."""
    return [spacing + ending for spacing in SPACINGS for ending in ("", *(f"+{name}" for name in TRANSFORMS))]


def steps_of(
    query: Mapping[str, str], manifest: Manifest, limits: PlanLimits | None, options: Options
) -> dict[str, Any]:
    """Return the `total` steps of a schedule, the `first` one taken, and where the base stops for each of `FRACTIONS`.

    `query` holds fields of a request as text, those of `ASKED`; the others are not looked at. Raises ApiError, or
    UsageError, for a value that the request would be refused for.
    """
    stated = {name: query[name] for name in ASKED if name in query}
    asked = read_asked({"prompt": "a", "handoff": "null", **stated}, edit=True, form=True)
    sizes = Sizes.of(manifest, limits, options.max_pixels, refined=False)
    # Only where it comes in matters, not what it shows.
    start = Start(np.zeros((*sizes.usual, 3), np.uint8)) if asked.strength is not None else None
    work = translate(asked, options, manifest, limits, lambda lora: lora.name, start).request
    resolved = resolve_request(work, manifest, limits)
    cuts = [step_at_fraction(resolved.schedule, fraction) for fraction in FRACTIONS]
    return {"total": resolved.schedule.steps, "first": resolved.first.start, "cuts": cuts}
