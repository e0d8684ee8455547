"""`--preview`: what the latents of a running step come to, roughly, in a file that is replaced as the run goes on."""

__all__ = ["Colours", "Preview", "approximate", "colours_of"]

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines.bundle.manifest import Manifest
from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime.picture_files import save_image
from sdxl_trt.runtime.run import Latents, Step

PER_STAGE = 10
"""How often, about, a preview is written while base or refiner runs."""


@dataclass(frozen=True)
class Colours:
    """A linear stand-in for a decoder: red, green and blue in [-1, 1] of each latent channel, and of no latents."""

    factors: tuple[tuple[float, float, float], ...]
    offset: tuple[float, float, float]


# What ComfyUI publishes for SDXL's autoencoder (comfy/latent_formats.py, class SDXL). Every model that goes on from
# SDXL has its latents, whatever its decoder is.
SDXL = Colours(
    ((0.3651, 0.4232, 0.4341), (-0.2533, -0.0042, 0.1068), (0.1076, 0.1111, -0.0362), (-0.3165, -0.2492, -0.2188)),
    (0.1084, -0.0175, -0.0011),
)
# The embedded pair has latents of its own: a least-squares fit to what its decoder makes of pictures of its training.
EMBEDDED = Colours(
    ((0.7308, 0.0015, 0.0068), (0.0063, 0.6223, 0.0029), (-0.0083, -0.0056, 0.6875), (0.0001, 0.0012, 0.0055)),
    (0.1333, -0.1113, -0.1967),
)
OF_DECODERS = {"ec74f3ea6fa45ec873f624600f97fd4ae9cabd8b8aefd27c88eda84db1914ae5": EMBEDDED}
"""Decoders that are not SDXL's, by the digest of the tensors that they were exported from, in any precision."""


def colours_of(manifest: Manifest) -> Colours:
    """Return the colours of a bundle's latents: those of its decoder where it is known, else SDXL's.

    Latents of another number of channels than SDXL's are shown in grey, which gives their shapes away at least.
    """
    vae = manifest.base.vae
    known = OF_DECODERS.get(manifest.components[vae.decoder].source.sha256, SDXL)
    if len(known.factors) == vae.latent_channels:
        return known
    grey = 1.0 / vae.latent_channels
    return Colours(((grey, grey, grey),) * vae.latent_channels, (0.0, 0.0, 0.0))


def approximate(latents: Latents, colours: Colours = SDXL) -> NDArray[np.uint8]:
    """Return pixels (h, n·w, 3), one a latent, of clean latents (n, c, h, w) of unit scale: side by side."""
    row = np.concatenate([*np.moveaxis(latents, 1, -1)], axis=1)
    mixed = row @ np.array(colours.factors, np.float32) + np.array(colours.offset, np.float32)
    pixels: NDArray[np.uint8] = np.rint(np.clip(mixed / 2.0 + 0.5, 0.0, 1.0) * 255.0).astype(np.uint8)
    return pixels


class Preview:
    """A file `path` that shows the latest estimate of the pictures, in their size, while the ``with`` lasts.

    None as `path` shows nothing. Raises UsageError where the file is there already: it is not ours to remove.
    """

    def __init__(self, path: Path | None, manifest: Manifest) -> None:
        self._path = path
        self._factor = manifest.base.vae.factor
        self._colours = colours_of(manifest)
        if path is not None and path.exists():
            raise UsageError(f"--preview: {path} is there already; move it away, it would be replaced")

    def show(self, step: Step) -> None:
        """Replace the preview by that of a sampler step, if it is time for one."""
        if self._path is None or step.denoised is None or step.index % max(step.total // PER_STAGE, 1):
            return
        from PIL import Image  # noqa: PLC0415 - Pillow is loaded with the first picture

        small = Image.fromarray(approximate(step.denoised, self._colours))
        size = (small.width * self._factor, small.height * self._factor)
        save_image(small.resize(size, Image.Resampling.BILINEAR), self._path, {})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)
