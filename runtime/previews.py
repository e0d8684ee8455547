"""`--preview`: what the latents of a running step come to, roughly, in a file that is replaced as the run goes on."""

__all__ = ["Preview", "approximate"]

from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime.picture_files import save_image
from sdxl_trt.runtime.run import Latents, Step

# Red, green and blue of each latent channel in [-1, 1]: a linear fit to SDXL's decoder that ComfyUI publishes
# (comfy/latent_formats.py, class SDXL, latent_rgb_factors). Other autoencoders get the shapes and not the colours.
FACTORS = np.array(
    [[0.3920, 0.4054, 0.4549], [-0.2634, -0.0196, 0.0653], [0.0568, 0.1687, -0.0755], [-0.3112, -0.2359, -0.2076]],
    np.float32,
)
PER_STAGE = 10
"""How often, about, a preview is written while base or refiner runs."""


def approximate(latents: Latents) -> NDArray[np.uint8]:
    """Return pixels (h, n·w, 3), one a latent, of latents (n, 4, h, w) on their way: side by side, with their noise.

    Noise beyond unit spread is scaled away, so that a picture shows as early as it is there.
    """
    spread = np.maximum(latents.std(axis=(1, 2, 3), keepdims=True), np.float32(1.0))
    row = np.concatenate([*np.moveaxis(latents / spread, 1, -1)], axis=1)
    pixels: NDArray[np.uint8] = np.rint(np.clip(row @ FACTORS / 2.0 + 0.5, 0.0, 1.0) * 255.0).astype(np.uint8)
    return pixels


class Preview:
    """A file `path` that shows the latest latents while the ``with`` lasts, `factor` pixels for each of them.

    None as `path` shows nothing. Raises UsageError where the file is there already: it is not ours to remove.
    """

    def __init__(self, path: Path | None, factor: int) -> None:
        self._path = path
        self._factor = factor
        if path is not None and path.exists():
            raise UsageError(f"--preview: {path} is there already; move it away, it would be replaced")

    def show(self, step: Step) -> None:
        """Replace the preview by that of a sampler step, if it is time for one."""
        if self._path is None or step.latents is None or step.index % max(step.total // PER_STAGE, 1):
            return
        from PIL import Image  # noqa: PLC0415 - Pillow is loaded with the first picture

        small = Image.fromarray(approximate(step.latents))
        size = (small.width * self._factor, small.height * self._factor)
        save_image(small.resize(size, Image.Resampling.BILINEAR), self._path, {})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)
