"""The outline of a UNet, read from its tensors' names: how many transformer blocks it has, and where.

SSD-1B, Segmind-Vega and KOALA are SDXL's UNet with blocks removed; a file shows that only by its missing tensors.
"""

__all__ = ["Outline", "config_of", "read_outline"]

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sdxl_trt.engines import SourceError

# Per level, for each layer, the number of its transformer blocks; None for a layer without attention.
Levels = tuple[tuple[int | None, ...], ...]


@dataclass(frozen=True)
class Outline:
    """Transformer blocks by level and layer: `down` starts at the finest level, `up` at the coarsest.

    `middle` is None without a middle block, 0 if it has only a residual layer, else its number of transformer blocks.
    """

    down: Levels
    middle: int | None
    up: Levels


SSD_1B = Outline(((None, None), (2, 2), (4, 4)), 0, ((4, 4, 10), (2, 1, 1), (None, None, None)))
VEGA = Outline(((None, None), (1, 1), (2, 2)), 0, ((2, 2, 2), (1, 1, 1), (None, None, None)))
_PUBLISHED = {SSD_1B: "SSD-1B", VEGA: "Segmind-Vega"}


def read_outline(names: Iterable[str]) -> Outline | None:
    """Return the outline of the UNet with tensors `names`, either LDM's or diffusers'.

    None if the names belong to no UNet, or a layer is missing entirely. Source: sgm's ``UNetModel`` numbers its blocks
    in order of construction; a downsampler gets a number of its own, an upsampler is the end of its level's last block.
    """
    found = list(names)
    ldm = any(name.startswith("input_blocks.") for name in found)
    return _read_ldm(found) if ldm else _read_diffusers(found)


def _read_ldm(names: list[str]) -> Outline | None:
    depths = _depths(names, r"((?:input|output)_blocks\.\d+|middle_block)\.1\.transformer_blocks\.(\d+)\.")
    modules = {".".join(name.split(".")[:4]) for name in names}
    attends = {name.rpartition(".1.")[0] for name in names if re.match(r".*_blocks?(\.\d+)?\.1\.proj_in\.", name)}
    down: list[list[int | None]] = [[]]
    number = 1
    while any(f"input_blocks.{number}.0.{part}" in modules for part in ("in_layers", "op")):
        if f"input_blocks.{number}.0.op" in modules:
            down.append([])
        else:
            place = f"input_blocks.{number}"
            down[-1].append(depths.get(place, 0) if place in attends else None)
        number += 1
    up: list[list[int | None]] = [[]]
    number = 0
    while f"output_blocks.{number}.0.in_layers" in modules:
        place = f"output_blocks.{number}"
        up[-1].append(depths.get(place, 0) if place in attends else None)
        if f"{place}.1.conv" in modules or f"{place}.2.conv" in modules:
            up.append([])
        number += 1
    middle = depths.get("middle_block", 0) if any(name.startswith("middle_block.0.") for name in names) else None
    return _outline(down, middle, up)


def _read_diffusers(names: list[str]) -> Outline | None:
    depths = _depths(
        names, r"((?:down|up)_blocks\.\d+\.attentions\.\d+|mid_block\.attentions\.0)\.transformer_blocks\.(\d+)\."
    )
    layers = {match[1] for name in names if (match := re.match(r"((?:down|up)_blocks\.\d+\.resnets\.\d+)\.", name))}
    attends = {match[1] for name in names if (match := re.match(r"(.*\.attentions\.\d+)\.proj_in\.", name))}

    def levels(half: str) -> list[list[int | None]]:
        found: list[list[int | None]] = []
        while f"{half}.{len(found)}.resnets.0" in layers:
            level: list[int | None] = []
            while f"{half}.{len(found)}.resnets.{len(level)}" in layers:
                place = f"{half}.{len(found)}.attentions.{len(level)}"
                level.append(depths.get(place, 0) if place in attends else None)
            found.append(level)
        return found

    middle = any(name.startswith("mid_block.resnets.0.") for name in names)
    return _outline(
        levels("down_blocks"), depths.get("mid_block.attentions.0", 0) if middle else None, levels("up_blocks")
    )


def _depths(names: Iterable[str], pattern: str) -> dict[str, int]:
    """Return {layer: number of transformer blocks}."""
    depths: dict[str, int] = {}
    for name in names:
        match = re.match(pattern, name)
        if match:
            depths[match[1]] = max(depths.get(match[1], 0), int(match[2]) + 1)
    return depths


def _outline(down: list[list[int | None]], middle: int | None, up: list[list[int | None]]) -> Outline | None:
    whole = len(down) == len(up) > 0 and all(down) and all(up)
    return Outline(tuple(map(tuple, down)), middle, tuple(map(tuple, up))) if whole else None


def _config_outline(config: Mapping[str, Any]) -> Outline:
    """Return the outline that a UNet2DConditionModel's config specifies."""
    count = len(config["down_block_types"])
    layers = _each(config.get("layers_per_block", 2), count)
    depths = _each(config.get("transformer_layers_per_block", 1), count)
    back = config.get("reverse_transformer_layers_per_block") or depths[::-1]
    downs = zip(config["down_block_types"], depths, layers, strict=True)
    ups = zip(config["up_block_types"], back, layers[::-1], strict=True)
    down = [_layers(kind, depth, number) for kind, depth, number in downs]
    up = [_layers(kind, depth, number + 1) for kind, depth, number in ups]
    kind = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    middle = None if kind is None else _each(depths[-1], 1)[0] if "CrossAttn" in kind else 0
    return Outline(tuple(down), middle, tuple(up))


def _layers(kind: str, depth: Any, count: int) -> tuple[int | None, ...]:
    return tuple(_each(depth, count)) if "CrossAttn" in kind else (None,) * count


def _each(value: Any, count: int) -> list[Any]:
    return [value] * count if isinstance(value, int) else list(value)


def config_of(config: dict[str, Any], outline: Outline | None, where: str) -> tuple[dict[str, Any], str]:
    """Return `config` with the blocks of `outline`, and the model's name if they differ from the config's.

    Widths, heads and all else stay as in the config. The name is "" if the two agree, or if the numbers of levels
    differ, which removed blocks cannot explain: then a later check compares the tensors with the config. Raises
    SourceError for an outline that diffusers' UNet cannot have.
    """
    if outline is None or outline == _config_outline(config) or len(outline.down) != len(config["down_block_types"]):
        return config, ""
    down, up = outline.down, outline.up
    mixed = any(None in level and set(level) != {None} for level in (*down, *up))
    uneven = any(len(after) != len(before) + 1 for before, after in zip(down, up[::-1], strict=True))
    coarsest = next((depth for depth in down[-1] if depth is not None), outline.middle)
    if mixed or uneven or (outline.middle and outline.middle != coarsest):
        raise SourceError(f"{where}: the UNet has layers {list(down)}, middle {outline.middle}, {list(up)} (transformer"
                          " blocks each), which SDXL's UNet cannot have; is the checkpoint complete?")  # fmt: skip
    last = len(down) - 1
    middle = {None: None, 0: "UNetMidBlock2D"}.get(outline.middle, "UNetMidBlock2DCrossAttn")
    blocks = {
        "down_block_types": ["DownBlock2D" if None in level else "CrossAttnDownBlock2D" for level in down],
        "up_block_types": ["UpBlock2D" if None in level else "CrossAttnUpBlock2D" for level in up],
        "mid_block_type": middle,
        "layers_per_block": [len(level) for level in down],
        # diffusers needs a depth even for a level without attention; the coarsest level's is also the middle block's.
        "transformer_layers_per_block": [
            ((outline.middle if index == last else 0) or 1) if None in level else list(level)
            for index, level in enumerate(down)
        ],
        "reverse_transformer_layers_per_block": [1 if None in level else list(level) for level in up],
    }
    return config | blocks, _PUBLISHED.get(outline, "a UNet of its own outline")
