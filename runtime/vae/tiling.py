"""Decode or encode a large picture in overlapping tiles, which are blended where they overlap.

An autoencoder's group norms and attention see a whole tile, so two tiles differ slightly where they overlap, and near
its edges a tile lacks context that the whole picture has. Tiles therefore overlap by at least a quarter of their side,
and the weight of a tile's pixel falls toward a shared edge, to nothing at the edge itself.
"""

__all__ = ["decode_tiled", "encode_tiled", "tile_starts", "tile_weights"]

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines import Array

Latents = NDArray[np.float32]
OVERLAP = 0.25
"""The least share of a tile's side that overlaps its neighbour."""


def decode_tiled(decode: Callable[[Latents], Array], latents: Latents, tile: tuple[int, int]) -> NDArray[np.float32]:
    """Return the sample (n, channels, h·f, w·f), float32, of latents (n, c, h, w) in tiles of `tile` (height, width).

    `decode` returns the sample of one tile of latents, f times as high and wide. Every tile has the size `tile`, which
    must not exceed the latents. Besides the result, memory holds one decoded tile.
    """
    tops, lefts = (tile_starts(*pair) for pair in zip(latents.shape[2:], tile, strict=True))
    result: NDArray[np.float32] | None = None
    for row, top in enumerate(tops):
        for column, left in enumerate(lefts):
            sample = decode(latents[:, :, top : top + tile[0], left : left + tile[1]])
            factor = sample.shape[2] // tile[0]
            if result is None:
                height, width = (side * factor for side in latents.shape[2:])
                result = np.zeros((*sample.shape[:2], height, width), np.float32)
                down, across = tile_weights(tops, tile[0], factor), tile_weights(lefts, tile[1], factor)
            y, x = top * factor, left * factor
            weight = down[row][:, None] * across[column]
            result[:, :, y : y + len(down[row]), x : x + len(across[column])] += sample.astype(np.float32) * weight
    if result is None:
        raise ValueError(f"latents of shape {latents.shape} hold no tile")
    return result


def encode_tiled(
    encode: Callable[[NDArray[np.float32]], Array], sample: NDArray[np.float32], tile: tuple[int, int], factor: int
) -> NDArray[np.float32]:
    """Return the output (n, c, h, w) float32 of `encode` for a sample (n, channels, h·f, w·f), blended from tiles.

    `tile` (height, width) is in latents, of `factor` = f pixels each; `encode` receives one tile at a time, of that
    size. For moments, the means and the log variances are blended.
    """
    high, wide = (side // factor for side in sample.shape[2:])
    tops, lefts = tile_starts(high, tile[0]), tile_starts(wide, tile[1])
    down, across = tile_weights(tops, tile[0], 1), tile_weights(lefts, tile[1], 1)
    rows = []
    for top in tops:
        y = slice(top * factor, (top + tile[0]) * factor)
        parts = [encode(sample[:, :, y, left * factor : (left + tile[1]) * factor]) for left in lefts]
        rows.append(_added(parts, lefts, across, wide, axis=3))
    return _added(rows, tops, down, high, axis=2)


def _added(
    parts: Sequence[Array], starts: list[int], weights: list[NDArray[np.float32]], size: int, axis: int
) -> NDArray[np.float32]:
    """Return an array of `size` along `axis`: the weighted sum of `parts` that begin at `starts`."""
    shape = list(parts[0].shape)
    shape[axis] = size
    result = np.zeros(shape, np.float32)
    view = np.moveaxis(result, axis, -1)
    for part, start, weight in zip(parts, starts, weights, strict=True):
        view[..., start : start + len(weight)] += np.moveaxis(part.astype(np.float32), axis, -1) * weight
    return result


def tile_starts(size: int, tile: int) -> list[int]:
    """Return the starts of tiles of length `tile` along `size`: as few as OVERLAP allows, evenly spread.

    Raises ValueError where a tile is too small to overlap.
    """
    if tile >= size:
        return [0]
    stride = tile - math.ceil(tile * OVERLAP)
    if stride < 1:
        raise ValueError(f"tiles of {tile} cannot overlap and cover {size}")
    gaps = math.ceil((size - tile) / stride)
    return [round(i * (size - tile) / gaps) for i in range(gaps + 1)]


def tile_weights(starts: list[int], tile: int, factor: int) -> list[NDArray[np.float32]]:
    """Return each tile's weights (tile · factor,) along one axis; at every pixel they add up to 1 over the tiles.

    A weight rises and falls linearly over an overlap. A smoother ramp is 0.2 dB farther from the whole picture
    (measured on the embedded pair): it averages both tiles over less of the overlap.
    """
    ramps = [_ramp(starts, index, tile, factor) for index in range(len(starts))]
    total = np.zeros((starts[-1] + tile) * factor)
    for start, ramp in zip(starts, ramps, strict=True):
        total[start * factor : start * factor + len(ramp)] += ramp
    return [
        (ramp / total[start * factor : start * factor + len(ramp)]).astype(np.float32)
        for start, ramp in zip(starts, ramps, strict=True)
    ]


def _ramp(starts: list[int], index: int, tile: int, factor: int) -> NDArray[np.float64]:
    # Taken at the centre of a pixel, a weight is never 0, so every pixel has a positive total.
    pixels = np.arange(tile * factor) + 0.5
    ramp = np.ones(tile * factor)
    if index > 0:
        ramp *= np.minimum(1.0, pixels / ((starts[index - 1] + tile - starts[index]) * factor))
    if index < len(starts) - 1:
        ramp *= np.minimum(1.0, (tile * factor - pixels) / ((starts[index] + tile - starts[index + 1]) * factor))
    return ramp
