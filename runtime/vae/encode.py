"""Encode pictures to latents, whole or in tiles, and draw from the autoencoder's posterior."""

__all__ = ["Moments", "PictureEncoder", "Wanted", "encode", "encode_sample", "encoder_sizes"]

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines import Array, CorruptError, Engine, numpy_dtype
from sdxl_trt.engines.adapters import Use
from sdxl_trt.engines.bundle import Vae
from sdxl_trt.engines.residency import EnginePool
from sdxl_trt.runtime.images import Fit, InputPicture, fitted
from sdxl_trt.runtime.vae.decode import Latents
from sdxl_trt.runtime.vae.tile_sizes import Size, Span, choose_tile, component_sizes
from sdxl_trt.runtime.vae.tiling import encode_tiled

_LEAST_LOGVAR, _MOST_LOGVAR = -30.0, 20.0


@dataclass(frozen=True)
class Moments:
    """An encoder's output: the `mean` and standard `deviation` of a picture's latents, float32 (n, c, h, w) each."""

    mean: Latents
    deviation: Latents

    def drawn(self, noise: Latents | None, vae: Vae) -> Latents:
        """Return latents (count, c, h, w) for a sampler, scaled to unit variance: one draw for each of `noise`.

        `noise` (count, c, h, w) has unit variance, as in diffusers; None returns the mean, as in ComfyUI.
        """
        latents = self.mean if noise is None else self.mean + self.deviation * noise
        scale = np.float32(vae.scaling_factor)
        if vae.latents_mean is None or vae.latents_std is None:
            return latents * scale
        shape = (1, -1, 1, 1)
        mean, deviation = (np.array(each, np.float32).reshape(shape) for each in (vae.latents_mean, vae.latents_std))
        return (latents - mean) * scale / deviation


def encoder_sizes(pool: EnginePool, encoder: str, factor: int) -> list[Span] | None:
    """Return (smallest, largest) latents of every profile of component `encoder`; None if it takes any size.

    Its profiles are in pixels, `factor` per latent.
    """
    spans = component_sizes(pool, encoder, "sample")
    if spans is None:
        return None
    return [tuple((size[0] // factor, size[1] // factor) for size in span) for span in spans]  # type: ignore[misc]


def encode(engine: Engine, vae: Vae, pixels: NDArray[np.uint8], *, tile: Size | None = None) -> Moments:
    """Return the moments (1, c, h/f, w/f) of `pixels` (h, w, 3), whose sides are multiples of the factor f.

    With `tile` (height, width in latents), tiles are encoded one at a time and their moments blended. Raises
    CorruptError if the encoder outputs NaN or infinity.
    """
    sample = np.float32(2.0) * (pixels.astype(np.float32) / np.float32(255.0)) - np.float32(1.0)
    return encode_sample(engine, vae, np.ascontiguousarray(sample.transpose(2, 0, 1)[None]), tile=tile)


def encode_sample(engine: Engine, vae: Vae, sample: NDArray[np.float32], *, tile: Size | None = None) -> Moments:
    """Return the moments of a sample (1, 3, h, w) from -1 to 1, as `encode` does for pixels."""
    dtype = numpy_dtype(engine.component.input("sample"))

    def infer(part: NDArray[np.float32]) -> Array:
        parameters = engine.infer({"sample": part.astype(dtype)})["latent_parameters"]
        if not np.isfinite(parameters).all():
            raise CorruptError("the autoencoder output NaN or infinity for a picture; export the bundle with"
                               " --vae-precision fp32")  # fmt: skip
        return parameters

    parameters = infer(sample) if tile is None else encode_tiled(infer, sample, tile, vae.factor)
    mean, logvar = np.split(parameters.astype(np.float32), 2, axis=1)
    return Moments(mean, np.exp(np.float32(0.5) * np.clip(logvar, _LEAST_LOGVAR, _MOST_LOGVAR)))


@dataclass(frozen=True)
class Wanted:
    """A picture to encode with the autoencoder `vae` at `size` (height, width) in pixels; `tiled` requests tiles."""

    vae: Vae
    picture: InputPicture
    size: Size
    fit: Fit
    tiled: bool = False


class PictureEncoder:
    """Encodes pictures one at a time; every encoder is loaded once, and every picture is encoded once per size."""

    def __init__(self, pool: EnginePool) -> None:
        self._pool = pool

    def encode(self, wanted: Sequence[Wanted], next_engine: Use) -> Iterator[tuple[int, Moments]]:
        """Yield the index of each of `wanted` with its moments; `next_engine` is the engine needed afterwards.

        Raises CorruptError if an encoder outputs NaN or infinity.
        """
        encoders = list(dict.fromkeys(_encoder(each.vae) for each in wanted))
        for encoder, after in zip(encoders, [*encoders[1:], next_engine], strict=True):
            (engine,) = self._pool.phase(encoder, next_engines=(after,))
            done: dict[tuple[object, ...], Moments] = {}
            for number, each in enumerate(wanted):
                if _encoder(each.vae) != encoder:
                    continue
                key = (id(each.picture.array), each.size, each.fit, each.tiled)
                if key not in done:
                    done[key] = self._encoded(engine, each)
                yield number, done[key]

    def _encoded(self, engine: Engine, wanted: Wanted) -> Moments:
        pixels, factor = wanted.picture.pixels, wanted.vae.factor
        assert pixels is not None  # noqa: S101 - latents need no encoding
        takes = encoder_sizes(self._pool, _encoder(wanted.vae), factor)
        latents = wanted.size[0] // factor, wanted.size[1] // factor
        tile = choose_tile(latents, takes, factor, tiled=wanted.tiled)
        return encode(engine, wanted.vae, fitted(pixels, wanted.size, wanted.fit), tile=tile)


def _encoder(vae: Vae) -> str:
    assert vae.encoder is not None  # noqa: S101 - a request without it is refused
    return vae.encoder
