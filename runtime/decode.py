"""Latents to pictures in [-1, 1]: the autoencoder's scaling undone, and in tiles where a whole one is too large."""

__all__ = ["Latents", "Size", "Span", "choose_tile", "component_sizes", "decode", "decoder_sizes"]

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines.bundle.manifest import Vae
from sdxl_trt.engines.engine import Array, Engine, numpy_dtype
from sdxl_trt.engines.errors import CorruptError
from sdxl_trt.engines.plans.sizes import TILE
from sdxl_trt.engines.residency.pool import EnginePool
from sdxl_trt.runtime.tiling import decode_tiled

Latents = NDArray[np.float32]
Size = tuple[int, int]
Span = tuple[Size, Size]


def decoder_sizes(pool: EnginePool, decoder: str) -> list[Span] | None:
    """Return (smallest, largest) latents of every profile of component `decoder`; None where any size goes."""
    return component_sizes(pool, decoder, "latent_sample")


def component_sizes(pool: EnginePool, name: str, sample: str) -> list[Span] | None:
    """Return (smallest, largest) height and width of the input `sample` of every profile; None where any size goes."""
    record = pool.records.get(pool.stand_in(name))
    profiles = list(record.key.profiles) if record else []
    if pool.provider == "ort-tensorrt":
        from sdxl_trt.engines.backends.ort.providers import shape_limits  # noqa: PLC0415 - with it comes the planning of builds

        profiles = [shape_limits(pool.bundle, pool.stand_in(name))]
    shapes = [profile.shapes[sample] for profile in profiles]
    return [((low[2], low[3]), (high[2], high[3])) for low, _, high in shapes] or None


def choose_tile(latents: Size, takes: Sequence[Span] | None, factor: int, *, tiled: bool) -> Size | None:
    """Return the tile (height, width) to decode `latents` of this size in, or None for the whole at once.

    `takes` are the (smallest, largest) sizes that the decoder has profiles for, None where it takes any; `tiled` asks
    for tiles of TILE pixels where a larger picture would do. All sizes are latents, of `factor` pixels each. Where no
    profile fits into the latents the smallest is tried, for its engine to say what it takes.
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


def decode(engine: Engine, vae: Vae, latents: Latents, *, tile: Size | None = None) -> Array:
    """Return the sample (n, 3, h·f, w·f) of latents (n, c, h, w) as a sampler leaves them, about -1 to 1.

    A `tile` (height, width) of latents is decoded at a time, and the sample is then float32, blended of them.
    Raises CorruptError where the decoder answers with NaN or infinity.
    """
    unscaled = _unscaled(latents, vae)
    dtype = numpy_dtype(engine.component.input("latent_sample"))

    def infer(part: Latents) -> Array:
        sample = engine.infer({"latent_sample": part.astype(dtype)})["sample"]
        if not np.isfinite(sample).all():
            raise CorruptError(
                "the autoencoder answered with NaN or infinity, which would be a black picture; export the bundle"
                " with --vae-precision fp32"
            )
        return sample

    return infer(unscaled) if tile is None else decode_tiled(infer, unscaled, tile)


def _unscaled(latents: Latents, vae: Vae) -> Latents:
    """Undo the scaling that gives an autoencoder's latents unit variance."""
    unscaled = latents / np.float32(vae.scaling_factor)
    if vae.latents_mean is None or vae.latents_std is None:
        return unscaled
    mean, std = (np.array(values, np.float32).reshape(1, -1, 1, 1) for values in (vae.latents_mean, vae.latents_std))
    return unscaled * std + mean
