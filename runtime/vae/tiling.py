"""A large picture decoded, or encoded, in overlapping tiles that are blended where they meet.

An autoencoder's group norms and attention see a whole tile, so two tiles do not quite agree on what both show, and
next to its edges a tile lacks context that the whole picture has. Tiles therefore share at least a quarter of their
side, and a tile counts for less the nearer a pixel is to an edge that it shares: nothing at the edge itself.
"""

__all__ = ["decode_tiled", "encode_tiled", "tile_starts", "tile_weights"]

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines import Array

Latents = NDArray[np.float32]
OVERLAP = 0.25
"""The least share of a tile's side that its neighbour shows as well."""


def decode_tiled(decode: Callable[[Latents], Array], latents: Latents, tile: tuple[int, int]) -> NDArray[np.float32]:
    """Return the sample (n, channels, h·f, w·f), float32, of latents (n, c, h, w) in tiles of `tile` (height, width).

    `decode` answers a tile of the latents with its sample, f times as high and wide; it gets one tile at a time, and
    every tile has the size `tile`, no larger than the latents. Beside the result, memory holds one decoded tile.
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
    """Return what `encode` answers for a sample (n, channels, h·f, w·f), (n, c, h, w) float32, blended of tiles.

    `tile` (height, width) counts latents, of `factor` = f pixels each; `encode` gets one tile at a time, of that size.
    Of moments, means and logarithms of variances are blended.
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
    """Return `size` along `axis`, the weighed sum of `parts` that begin at `starts`."""
    shape = list(parts[0].shape)
    shape[axis] = size
    result = np.zeros(shape, np.float32)
    view = np.moveaxis(result, axis, -1)
    for part, start, weight in zip(parts, starts, weights, strict=True):
        view[..., start : start + len(weight)] += np.moveaxis(part.astype(np.float32), axis, -1) * weight
    return result


def tile_starts(size: int, tile: int) -> list[int]:
    """Return where tiles of `tile` start along `size`: as few as overlap by OVERLAP, evenly spread, the last flush.

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

    A weight rises and falls evenly over what the neighbours share. A smoother ramp is 0.2 dB farther from the whole
    picture (measured on the embedded pair): it spends less of the overlap on the mean of both tiles.
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
    # Taken at the middle of a pixel, a weight is never 0: no pixel is left without any.
    pixels = np.arange(tile * factor) + 0.5
    ramp = np.ones(tile * factor)
    if index > 0:
        ramp *= np.minimum(1.0, pixels / ((starts[index - 1] + tile - starts[index]) * factor))
    if index < len(starts) - 1:
        ramp *= np.minimum(1.0, (tile * factor - pixels) / ((starts[index] + tile - starts[index + 1]) * factor))
    return ramp
