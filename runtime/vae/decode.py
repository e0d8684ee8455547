"""Decode latents to pictures in [-1, 1]: undo the scaling of the latents, and use tiles if the whole is too large."""

__all__ = ["Latents", "decode_latents", "from_unit", "to_uint8", "to_uint8_truncated", "to_unit"]

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines import Array, CorruptError, Engine, numpy_dtype
from sdxl_trt.engines.bundle import Vae
from sdxl_trt.runtime.vae.tile_sizes import Size
from sdxl_trt.runtime.vae.tiling import decode_tiled

Latents = NDArray[np.float32]


def decode_latents(engine: Engine, vae: Vae, latents: Latents, *, tile: Size | None = None) -> Array:
    """Return the sample (n, 3, h·f, w·f), about -1 to 1, of a sampler's latents (n, c, h, w).

    With `tile` (height, width in latents), tiles are decoded one at a time and blended to a float32 sample.
    Raises CorruptError if the decoder outputs NaN or infinity.
    """
    unscaled = _unscaled(latents, vae)
    dtype = numpy_dtype(engine.component.input("latent_sample"))

    def infer(part: Latents) -> Array:
        sample = engine.infer({"latent_sample": part.astype(dtype)})["sample"]
        if not np.isfinite(sample).all():
            raise CorruptError(
                "the autoencoder output NaN or infinity, which would be a black picture; export the bundle with"
                " --vae-precision fp32"
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


def to_uint8(sample: Array) -> NDArray[np.uint8]:
    """Return pixels (n, h, w, 3) of a decoded sample (n, 3, h, w) in [-1, 1], rounded as in diffusers."""
    scaled = np.clip(sample.astype(np.float32) / 2.0 + 0.5, 0.0, 1.0) * 255.0
    pixels: NDArray[np.uint8] = np.rint(scaled).astype(np.uint8)
    return pixels.transpose(0, 2, 3, 1)


def to_uint8_truncated(sample: Array) -> NDArray[np.uint8]:
    """Return pixels (n, h, w, 3) of a decoded sample (n, 3, h, w) in [-1, 1], truncated as in ComfyUI's SaveImage."""
    return from_unit(to_unit(sample))


def to_unit(sample: Array) -> NDArray[np.float32]:
    """Return a decoded sample (n, 3, h, w) in [-1, 1] as pixels from 0 to 1, as ComfyUI's VAEDecode returns them."""
    # The operations and their order are ComfyUI's: rounding before the truncation decides between two pixel values.
    unit: NDArray[np.float32] = np.clip((sample.astype(np.float32) + 1.0) / 2.0, 0.0, 1.0)
    return unit


def from_unit(unit: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return pixels (n, h, w, 3) of values (n, 3, h, w) from 0 to 1, truncated as in ComfyUI's SaveImage."""
    pixels: NDArray[np.uint8] = np.clip(unit * np.float32(255.0), 0, 255).astype(np.uint8)
    return pixels.transpose(0, 2, 3, 1)
