"""The conditioning of one side of a stage, as a workflow states it."""

__all__ = ["Pair", "Side", "SideMix", "StageName", "all_sides"]

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from sdxl_trt.runtime.adapters import LoraUse

Pair = tuple[int, int]
StageName = Literal["base", "refiner"]


@dataclass(frozen=True, kw_only=True)
class SideMix:
    """A change of a side's conditioning, as ComfyUI's nodes do it: zeros (ConditioningZeroOut), `other` concatenated
    ("concat") or averaged ("average"), with weight `strength` for the side itself.
    """

    kind: Literal["zero", "concat", "average"]
    other: "Side | None" = None
    strength: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Side:
    """The conditioning of one side of a stage, instead of the request's own; None takes the request's setting.

    `zeroed` is ComfyUI's ConditioningZeroOut of the prompt alone; `mixes` are applied in order. Sizes are (height,
    width), a crop is (top, left), in pixels. `loras` are those of the text encoders for this prompt, each with its
    scale on these as the only one; None takes the stage's. `combined` are more sides: the model's predictions for all
    are averaged.
    """

    text: str
    text_2: str
    zeroed: bool = False
    clip_skip: int | None = None
    loras: tuple[LoraUse, ...] | None = None
    mixes: tuple[SideMix, ...] = ()
    combined: tuple["Side", ...] = ()
    original_size: Pair | None = None
    crop: Pair | None = None
    target_size: Pair | None = None
    aesthetic_score: float | None = None


def all_sides(sides: tuple[Side, ...]) -> Iterator[Side]:
    """Yield `sides`, and those that are mixed into them or combined with them."""
    for side in sides:
        yield side
        yield from all_sides(tuple(mix.other for mix in side.mixes if mix.other is not None))
        yield from all_sides(side.combined)
