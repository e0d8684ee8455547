"""`--preview`: a rough picture of the running step's latents, in a file that is replaced during the run."""

__all__ = ["Preview"]

from pathlib import Path
from types import TracebackType
from typing import Self

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.bundle import Manifest
from sdxl_trt.runtime.images import save_image
from sdxl_trt.runtime.pipeline import Step
from sdxl_trt.runtime.vae import approximate, colours_of

PER_STAGE = 10
"""About how many previews are written while base or refiner runs."""


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
