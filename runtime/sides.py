"""What each side of a stage, positive and negative, is told: prompt, sizes, crop, score; defaults are resolved here."""

__all__ = ["Side", "SideSettings", "StageName", "Told", "tell"]

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sdxl_trt.engines.errors import UsageError
from sdxl_trt.engines.manifest import Manifest, Stage
from sdxl_trt.runtime.conditioning import MicroConditions
from sdxl_trt.runtime.prompts import PENULTIMATE, Prompt

StageName = Literal["base", "refiner"]
Pair = tuple[int, int]
MAX_CONDITION = 1 << 20
"""More than any size that a picture is said to have had; float32 holds every whole number up to it."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """What one side of a stage is told in place of the request's own; None leaves a setting to the request.

    `zeroed` is ComfyUI's ConditioningZeroOut. Sizes are (height, width), a crop is (top, left), in pixels.
    """

    text: str
    text_2: str
    zeroed: bool = False
    original_size: Pair | None = None
    crop: Pair | None = None
    target_size: Pair | None = None
    aesthetic_score: float | None = None


@dataclass(frozen=True, kw_only=True)
class SideSettings:
    """What a request says of all sides, and of those of one stage, (positive, negative).

    `negative` None is an absent negative prompt, which is not the same as "". Sizes are (height, width) in pixels,
    None those of the picture; a crop is (top, left). `clip_skip` layers more than SDXL's one are left out.
    """

    prompt_2: str | None = None
    negative: str | None = None
    negative_2: str | None = None
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5
    original_size: Pair | None = None
    crop: Pair = (0, 0)
    target_size: Pair | None = None
    clip_skip: int = 0
    base_sides: tuple[Side, Side] | None = None
    refiner_sides: tuple[Side, Side] | None = None


@dataclass(frozen=True)
class Told:
    """What one side of a stage is told, settled."""

    prompt: Prompt
    micro: MicroConditions
    zeroed: bool = False


def tell(
    prompt: str, settings: SideSettings, manifest: Manifest, size: Pair, *, comfyui: bool
) -> Mapping[StageName, tuple[Told, Told]]:
    """Return what the (positive, negative) sides of every stage are told for a picture of `size` (height, width).

    As in diffusers an absent negative is zeroed where the stage's config says so, and only the positive skips layers;
    with `comfyui` it is "", and both skip. Raises UsageError.
    """
    _check(settings, manifest)
    stages: dict[StageName, Stage] = {"base": manifest.base}
    if manifest.refiner is not None:
        stages["refiner"] = manifest.refiner
    own = {"base": settings.base_sides, "refiner": settings.refiner_sides}
    told: dict[StageName, tuple[Told, Told]] = {}
    for name, stage in stages.items():
        zeroed = settings.negative is None and stage.force_zeros_for_empty_prompt and not comfyui
        usual = (
            Side(text=prompt, text_2=settings.prompt_2 or prompt),
            # As in diffusers, an empty second prompt means the first one.
            Side(text=settings.negative or "", text_2=settings.negative_2 or settings.negative or "", zeroed=zeroed),
        )
        positive, negative = own[name] or usual
        told[name] = (
            _settled(positive, settings, size, settings.clip_skip),
            _settled(negative, settings, size, settings.clip_skip if comfyui else 0),
        )
    return told


def _settled(side: Side, settings: SideSettings, size: Pair, clip_skip: int) -> Told:
    scores = settings.aesthetic_score, settings.negative_aesthetic_score
    if side.aesthetic_score is not None:
        # Which of the two is read depends on the side, and this is the side's.
        scores = side.aesthetic_score, side.aesthetic_score
    micro = MicroConditions(
        _stated(side.original_size, settings.original_size, size),
        _stated(side.crop, settings.crop, (0, 0)),
        _stated(side.target_size, settings.target_size, size),
        *scores,
    )
    return Told(Prompt(side.text, side.text_2, clip_skip), micro, side.zeroed)


def _stated(*values: Pair | None) -> Pair:
    return next(value for value in values if value is not None)


def _check(settings: SideSettings, manifest: Manifest) -> None:
    if settings.negative is None and settings.negative_2 is not None:
        raise UsageError('--negative-2 without --negative: give --negative too, "" if it is to be empty')
    sides = [*(settings.base_sides or ()), *(settings.refiner_sides or ())]
    conditions = {
        "--original-size": [settings.original_size, *(side.original_size for side in sides)],
        "--crop": [settings.crop, *(side.crop for side in sides)],
        "--target-size": [settings.target_size, *(side.target_size for side in sides)],
    }
    for option, pairs in conditions.items():
        for value in (value for pair in pairs if pair is not None for value in pair):
            if not 0 <= value <= MAX_CONDITION:
                raise UsageError(f"{option}: {value} pixels given; choose 0 to {MAX_CONDITION}")
    most = _most_skipped(manifest)
    if not 0 <= settings.clip_skip <= most:
        raise UsageError(f"--clip-skip {settings.clip_skip}: choose 0 to {most}")


def _most_skipped(manifest: Manifest) -> int:
    """Return how many layers more than SDXL's one every text encoder can leave out."""
    names = {encoder.component for stage in manifest.stages().values() for encoder in stage.text_encoders}
    outputs = [manifest.components[name].outputs for name in names]
    states = (sum(spec.name.startswith("hidden_states.") for spec in each) for each in outputs)
    return min(states, default=-PENULTIMATE) + PENULTIMATE
