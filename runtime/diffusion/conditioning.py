"""A stage's conditioning inputs: prompts, sizes, crop and aesthetic score."""

__all__ = ["Conditions", "MicroConditions", "make_conditions"]

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines import Array, CorruptError, Engine, numpy_dtype
from sdxl_trt.engines.bundle import Stage
from sdxl_trt.runtime.diffusion.guidance import guides
from sdxl_trt.runtime.text import PromptEmbeds


@dataclass(frozen=True)
class MicroConditions:
    """SDXL's size and crop conditions in pixels (height, width; top, left), and the refiner's aesthetic scores."""

    original_size: tuple[int, int]
    crop: tuple[int, int]
    target_size: tuple[int, int]
    aesthetic_score: float
    negative_aesthetic_score: float

    def time_ids(self, layout: tuple[str, ...], *, negative: bool = False) -> NDArray[np.float32]:
        """Return the time ids (len(layout),) in the order that the manifest states for a stage."""
        values: dict[str, float] = {
            "original_height": self.original_size[0],
            "original_width": self.original_size[1],
            "crop_top": self.crop[0],
            "crop_left": self.crop[1],
            "target_height": self.target_size[0],
            "target_width": self.target_size[1],
            "aesthetic_score": self.negative_aesthetic_score if negative else self.aesthetic_score,
        }
        unknown = [name for name in layout if name not in values]
        if unknown:
            raise CorruptError(f"time id {unknown[0]!r} in the manifest is unknown; export the bundle again")
        return np.array([values[name] for name in layout], dtype=np.float32)


Embeds = PromptEmbeds | Sequence[PromptEmbeds]
Micro = MicroConditions | Sequence[MicroConditions]


@dataclass(frozen=True)
class Conditions:
    """The constant inputs of a UNet for a phase: rows [positive…, negative…], or only positive ones without guidance.

    A side with several conditionings has one block of rows for each, one after the other.
    """

    inputs: dict[str, Array]
    guidance_scale: float
    pictures: int = 0
    """The number of pictures that the rows are for; 0 for the batch size of the latents."""
    comfyui_rule: bool = False
    """Whether every guidance scale except 1 guides, as in ComfyUI."""
    positives: int = 1
    negatives: int = 1
    """The number of conditionings of each side, a block of rows each; their predictions are averaged."""

    @property
    def guided(self) -> bool:
        """Return whether there are negative rows."""
        return guides(self.guidance_scale, comfyui_rule=self.comfyui_rule)


def make_conditions(
    engine: Engine,
    stage: Stage,
    positive: Embeds,
    negative: Embeds,
    micro: MicroConditions | tuple[Micro, Micro],
    guidance_scale: float,
    pictures: int,
    *,
    comfyui_rule: bool = False,
) -> Conditions:
    """Return the conditions of `pictures` pictures of one prompt, in the dtypes of `engine`'s inputs.

    A side is one conditioning, or several whose predictions are averaged. `micro` holds for both sides, or for each.
    Prompts of different lengths are repeated to their least common multiple, as in ComfyUI: cross-attention gives the
    same result for repeated tokens.
    """
    both = (micro, micro) if isinstance(micro, MicroConditions) else micro
    positives, negatives = _side(positive, both[0]), _side(negative, both[1])
    sides = [(embeds, each, False) for embeds, each in positives]
    if guides(guidance_scale, comfyui_rule=comfyui_rule):
        sides += [(embeds, each, True) for embeds, each in negatives]
    columns = {
        "encoder_hidden_states": _equally_long([embeds.hidden for embeds, _, _ in sides]),
        "text_embeds": [embeds.pooled for embeds, _, _ in sides],
        "time_ids": [each.time_ids(stage.time_ids, negative=is_negative) for _, each, is_negative in sides],
    }
    inputs = {
        name: np.repeat(np.stack(rows), pictures, axis=0).astype(numpy_dtype(engine.component.input(name)))
        for name, rows in columns.items()
    }
    return Conditions(inputs, guidance_scale, pictures, comfyui_rule, len(positives), len(negatives))


def _side(embeds: Embeds, micro: Micro) -> list[tuple[PromptEmbeds, MicroConditions]]:
    """Return the conditionings of a side, each with its micro-conditions."""
    several = [embeds] if isinstance(embeds, PromptEmbeds) else [*embeds]
    sizes = [micro] * len(several) if isinstance(micro, MicroConditions) else [*micro]
    return [*zip(several, sizes, strict=True)]


def _equally_long(hidden: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    length = math.lcm(*(len(each) for each in hidden))
    return [np.tile(each, (length // len(each), 1)) for each in hidden]
