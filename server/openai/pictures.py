"""Pictures as files: finished ones and estimates in the format that was asked for; an edit's picture and its mask."""

__all__ = ["encode", "estimate_picture", "start_from"]

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines.bundle import Manifest
from sdxl_trt.runtime import Picture
from sdxl_trt.runtime.images import FORMATS, describe, encode_image
from sdxl_trt.runtime.vae import approximate, colours_of
from sdxl_trt.server.openai.body import Output, Start, invalid

if TYPE_CHECKING:
    from PIL.Image import Image

OPAQUE = 255
_HALF = 128
"""From this grey on a mask counts as white."""


def encode(picture: Picture, output: Output) -> bytes:
    """Return the file of a finished picture, which holds the settings that draw it again."""
    texts = describe(picture.metadata, picture.graph)
    return encode_image(picture.image, FORMATS[f".{output.format}"], texts, quality=output.quality)


def estimate_picture(latents: NDArray[np.float32], manifest: Manifest, output: Output) -> bytes:
    """Return the file of a rough picture of clean latents (c, h, w), in the size of the finished one."""
    from PIL import Image  # noqa: PLC0415 - Pillow is loaded with the first picture

    small = Image.fromarray(approximate(latents[None], colours_of(manifest)))
    factor = manifest.base.vae.factor
    whole = small.resize((small.width * factor, small.height * factor), Image.Resampling.BILINEAR)
    return encode_image(whole, FORMATS[f".{output.format}"], {}, quality=output.quality)


def start_from(picture: "Image", mask: "Image | None") -> Start:
    """Return what an edit starts from; OpenAI's masks are transparent where the picture changes.

    Raises ApiError (400) for a mask without transparency, of another size, or opaque everywhere.
    """
    warnings: tuple[str, ...] = ()
    if picture.has_transparency_data and np.asarray(picture.convert("RGBA").getchannel("A")).min() < OPAQUE:
        warnings = ("image: its transparency is not used",)
    pixels = np.array(picture.convert("RGB"))
    if mask is None:
        return Start(pixels, None, warnings)
    if mask.size != picture.size:
        raise invalid("mask", f"has {mask.width}x{mask.height} pixels, and the picture {picture.width}x"
                              f"{picture.height}; make the mask of the picture's size", "invalid_image")  # fmt: skip
    if not mask.has_transparency_data:
        raise invalid("mask", "has no transparency; make transparent what is to change", "invalid_image")
    changes = OPAQUE - np.array(mask.convert("RGBA").getchannel("A"))
    if changes.max() < _HALF:
        raise invalid("mask", "is opaque everywhere; make transparent what is to change", "invalid_image")
    return Start(pixels, changes, warnings)
