"""Choose the tile size for a decoder or encoder."""

__all__ = ["Size", "Span", "choose_tile", "component_sizes", "decoder_sizes"]

import math
from collections.abc import Sequence

from sdxl_trt.engines.plans import TILE
from sdxl_trt.engines.residency import EnginePool

Size = tuple[int, int]
Span = tuple[Size, Size]


def decoder_sizes(pool: EnginePool, decoder: str) -> list[Span] | None:
    """Return (smallest, largest) latents of every profile of component `decoder`; None if it takes any size."""
    return component_sizes(pool, decoder, "latent_sample")


def component_sizes(pool: EnginePool, name: str, sample: str) -> list[Span] | None:
    """Return (smallest, largest) height and width of the input `sample` of every profile; None if any size fits."""
    shapes = [profile.shapes[sample] for profile in pool.profiles(name)]
    return [((low[2], low[3]), (high[2], high[3])) for low, _, high in shapes] or None


def choose_tile(latents: Size, takes: Sequence[Span] | None, factor: int, *, tiled: bool) -> Size | None:
    """Return the tile (height, width) for decoding `latents` of this size, or None to decode all at once.

    `takes` are the (smallest, largest) sizes of the decoder's profiles, None if it takes any size; `tiled` requests
    tiles of TILE pixels even if more would fit. All sizes are in latents, of `factor` pixels each. If no profile fits
    into the latents, the smallest is returned, and its engine raises an error that states what it takes.
    """
    spans = takes or [((1, 1), latents)]
    wanted = (TILE // factor, TILE // factor) if tiled else latents
    tiles = [tuple(_within(axes) for axes in zip(latents, wanted, *span, strict=True)) for span in spans]
    fitting = [(high, wide) for high, wide in tiles if high <= latents[0] and wide <= latents[1]]
    asked = [tile for tile in fitting if tile[0] <= wanted[0] and tile[1] <= wanted[1]]
    best = max(asked or fitting, key=math.prod, default=min(tiles, key=math.prod))
    return None if best == latents else (best[0], best[1])


def _within(axis: tuple[int, int, int, int]) -> int:
    size, wanted, least, most = axis
    return min(max(min(size, wanted), least), most)
