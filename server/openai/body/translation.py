"""From what is asked to a Request: sizes against the bundle, LoRAs by name, the picture and its mask."""

__all__ = ["DEFAULT_STRENGTH", "Start", "Translated", "translate"]

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines.bundle import Manifest
from sdxl_trt.engines.plans import PlanLimits
from sdxl_trt.runtime import Request
from sdxl_trt.runtime.adapters import LoraUse
from sdxl_trt.server.openai.body.asked import Asked, NamedLora
from sdxl_trt.server.openai.body.fields import invalid
from sdxl_trt.server.openai.body.sizes import Size, Sizes, told
from sdxl_trt.server.options import Options

DEFAULT_STRENGTH = 0.6
"""Of a picture without a mask: OpenAI's edits have no such number, and change much of a picture."""
Find = Callable[[NamedLora], str]
"""Returns the path of a LoRA's file."""


@dataclass(frozen=True, eq=False)
class Start:
    """What an edit starts from: pixels uint8 (h, w, 3), and uint8 (h, w), 255 where they change, None without a mask.

    `warnings` are sentences on what of the files is not used.
    """

    pixels: NDArray[np.uint8]
    mask: NDArray[np.uint8] | None = None
    warnings: tuple[str, ...] = ()

    @property
    def size(self) -> Size:
        """Return (height, width)."""
        return self.pixels.shape[0], self.pixels.shape[1]


@dataclass(frozen=True)
class Translated:
    """A Request, and the warnings that its answer carries."""

    request: Request
    warnings: tuple[str, ...]


def translate(
    asked: Asked,
    options: Options,
    manifest: Manifest,
    limits: PlanLimits | None,
    find: Find,
    start: Start | None = None,
) -> Translated:
    """Return the Request for what is `asked` of a bundle with `manifest` and plans of these `limits`.

    Raises ApiError (400) that names the field: for a size that the bundle cannot draw, with the nearest one.
    """
    refined = manifest.refiner is not None and asked.handoff is not None
    sizes = Sizes.of(manifest, limits, options.max_pixels, refined=refined)
    _check_cache(asked, manifest, refined=refined)
    size, notes = _size(asked, sizes, start)
    request = Request(
        prompt=asked.prompt,
        negative=asked.negative,
        seed=asked.seed,
        handoff=_handoff(asked, manifest),
        height=size[0],
        width=size[1],
        compat=asked.compat,
        count=asked.n,
        loras=tuple(LoraUse(find(lora), lora.scale, lora.text_scale) for lora in asked.loras),
        lora_dir=options.lora_dir,
        embedding_dir=options.embedding_dir,
        **_stated(asked, options.quality_steps),
    )
    if start is not None:
        request = replace(request, image=start.pixels, mask=start.mask, strength=_strength(asked, start))
        notes += start.warnings
    if not refined:
        notes += tuple(f"{name}: only the refiner reads it" for name in ("aesthetic_score", "negative_aesthetic_score")
                       if getattr(asked, name) is not None and not _reads_scores(manifest))  # fmt: skip
    if asked.compat == "comfyui" and asked.n > 1:
        notes += ("compat: in ComfyUI's way the pictures are a batch of one seed",)
    return Translated(request, (*asked.warnings, *notes))


def _size(asked: Asked, sizes: Sizes, start: Start | None) -> tuple[Size, tuple[str, ...]]:
    """Return the size to draw, and a warning where it is not the size or the shape of the picture to start from."""
    if start is None:
        return sizes.usual if asked.size is None else sizes.check(asked.size), ()
    size = sizes.for_picture(start.size) if asked.size is None else sizes.check(asked.size)
    if size == start.size:
        return size, ()
    cropped = size[0] * start.size[1] != size[1] * start.size[0]
    how = "scaled and cropped" if cropped else "scaled"
    return size, (f"image: the picture of {told(start.size)} is {how} to {told(size)}",)


def _reads_scores(manifest: Manifest) -> bool:
    return "aesthetic_score" in manifest.base.time_ids


def _handoff(asked: Asked, manifest: Manifest) -> Any:
    if isinstance(asked.handoff, float) and manifest.refiner is None:
        raise invalid("handoff", "the bundle has no refiner; leave it out, or give null")
    return asked.handoff


def _check_cache(asked: Asked, manifest: Manifest, *, refined: bool) -> None:
    """Raise ApiError for a cache that the bundle's UNets do not allow."""
    every = {"base": ("cache", asked.cache)}
    if refined:
        own = asked.refiner_cache is not None
        every["refiner"] = ("refiner_cache", asked.refiner_cache) if own else ("cache", asked.cache)
    for stage, (field, value) in every.items():
        if (value or 1) > 1 and manifest.stages()[stage].shallow is None:
            if stage == "refiner" and manifest.base.shallow is not None:
                raise invalid(field, "the bundle's refiner was exported without a shallow UNet; give refiner_cache 1 to"
                                     " leave the refiner out of the cache")  # fmt: skip
            raise invalid(field, "the bundle was exported without shallow UNets; leave it out")


def _stated(asked: Asked, factors: Mapping[str, float]) -> dict[str, Any]:
    """Return the settings that are stated, and the steps that the quality means where none are."""
    usual = Request().steps
    steps = max(round(usual * factors.get(asked.quality, 1.0)), 1) if asked.steps is None else asked.steps
    stated = {"steps": steps, "guidance": asked.guidance, "refiner_guidance": asked.refiner_guidance,
              "sampler": asked.sampler, "schedule": asked.schedule, "aesthetic_score": asked.aesthetic_score,
              "negative_aesthetic_score": asked.negative_aesthetic_score, "cache": asked.cache,
              "refiner_cache": asked.refiner_cache}  # fmt: skip
    return {name: value for name, value in stated.items() if value is not None}


def _strength(asked: Asked, start: Start) -> float | None:
    """Return how much changes; None with a mask is the runtime's own, nearly all of what the mask shows."""
    return DEFAULT_STRENGTH if asked.strength is None and start.mask is None else asked.strength
