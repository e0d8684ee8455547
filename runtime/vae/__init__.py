"""Pixels to latents and back."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.runtime.vae.decode import decode_latents, from_unit, to_uint8, to_uint8_truncated, to_unit
    from sdxl_trt.runtime.vae.encode import Moments, PictureEncoder, Wanted, encode_sample, encoder_sizes
    from sdxl_trt.runtime.vae.preview import approximate, colours_of
    from sdxl_trt.runtime.vae.tile_sizes import Size, choose_tile, decoder_sizes
    from sdxl_trt.runtime.vae.tiling import decode_tiled, tile_starts
else:
    __getattr__ = lazy_names(__name__, {
        "decode": ("decode_latents", "from_unit", "to_uint8", "to_uint8_truncated", "to_unit"),
        "encode": ("Moments", "PictureEncoder", "Wanted", "encode_sample", "encoder_sizes"),
        "preview": ("approximate", "colours_of"),
        "tile_sizes": ("Size", "choose_tile", "decoder_sizes"),
        "tiling": ("decode_tiled", "tile_starts"),
    })

__all__ = [
    "Moments", "PictureEncoder", "Size", "Wanted", "approximate", "choose_tile", "colours_of", "decode_latents",
    "decode_tiled", "decoder_sizes", "encode_sample", "encoder_sizes", "from_unit", "tile_starts", "to_uint8",
    "to_uint8_truncated", "to_unit",
]
