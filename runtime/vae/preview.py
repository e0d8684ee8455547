"""A linear approximation of a decoder, for previews."""

__all__ = ["Colours", "approximate", "colours_of"]

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines.bundle import Manifest
from sdxl_trt.runtime.arrays import Latents


@dataclass(frozen=True)
class Colours:
    """A linear decoder: red, green and blue in [-1, 1] per unit of each latent channel, and an offset."""

    factors: tuple[tuple[float, float, float], ...]
    offset: tuple[float, float, float]


# ComfyUI's values for SDXL's autoencoder (comfy/latent_formats.py, class SDXL). Every model derived from SDXL has the
# same latents, whatever decoder it has.
SDXL = Colours(
    ((0.3651, 0.4232, 0.4341), (-0.2533, -0.0042, 0.1068), (0.1076, 0.1111, -0.0362), (-0.3165, -0.2492, -0.2188)),
    (0.1084, -0.0175, -0.0011),
)
# The embedded pair has latents of its own: a least-squares fit to its decoder's output for its training pictures.
EMBEDDED = Colours(
    ((0.7308, 0.0015, 0.0068), (0.0063, 0.6223, 0.0029), (-0.0083, -0.0056, 0.6875), (0.0001, 0.0012, 0.0055)),
    (0.1333, -0.1113, -0.1967),
)
OF_DECODERS = {"ec74f3ea6fa45ec873f624600f97fd4ae9cabd8b8aefd27c88eda84db1914ae5": EMBEDDED}
"""Decoders that are not SDXL's, by the digest of the tensors they were exported from, in any precision."""


def colours_of(manifest: Manifest) -> Colours:
    """Return the colours of a bundle's latents: those of its decoder if it is known, else SDXL's.

    Latents with another number of channels than SDXL's are shown in grey, so that at least shapes can be seen.
    """
    vae = manifest.base.vae
    known = OF_DECODERS.get(manifest.components[vae.decoder].source.sha256, SDXL)
    if len(known.factors) == vae.latent_channels:
        return known
    grey = 1.0 / vae.latent_channels
    return Colours(((grey, grey, grey),) * vae.latent_channels, (0.0, 0.0, 0.0))


def approximate(latents: Latents, colours: Colours = SDXL) -> NDArray[np.uint8]:
    """Return pixels (h, n·w, 3), one per latent, of clean latents (n, c, h, w) of unit scale, side by side."""
    row = np.concatenate([*np.moveaxis(latents, 1, -1)], axis=1)
    mixed = row @ np.array(colours.factors, np.float32) + np.array(colours.offset, np.float32)
    pixels: NDArray[np.uint8] = np.rint(np.clip(mixed / 2.0 + 0.5, 0.0, 1.0) * 255.0).astype(np.uint8)
    return pixels
