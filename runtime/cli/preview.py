"""`--preview`: a rough picture of the running step's latents, in a file that is replaced during the run."""

__all__ = ["Preview"]

from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np

from sdxl_trt.engines import Engine, UsageError
from sdxl_trt.engines.backends import open_backend
from sdxl_trt.engines.bundle import Bundle
from sdxl_trt.runtime.arrays import Latents
from sdxl_trt.runtime.images import save_image
from sdxl_trt.runtime.pipeline import Step
from sdxl_trt.runtime.vae import approximate, choose_tile, colours_of, decode_latents, to_uint8

PER_STAGE = 10
"""About how many previews are written while base or refiner runs."""


class Preview:
    """A file `path` that shows the latest estimate of the pictures, in their size, while the ``with`` lasts.

    None as `path` shows nothing. With `method` "tiny" the bundle's tiny decoder makes it, on the CPU and in tiles, so
    that the memory of the device is left to the run. Raises UsageError where the file is there already, since it is not
    ours to remove, and for a bundle without a tiny decoder; IncompatibleError for one that has no graphs, or in bf16.
    """

    def __init__(self, path: Path | None, bundle: Bundle, method: Literal["linear", "tiny"] = "linear") -> None:
        self._path = path
        self._vae = bundle.manifest.base.vae
        self._colours = colours_of(bundle.manifest)
        self._tiny: Engine | None = None
        if path is not None and path.exists():
            raise UsageError(f"--preview: {path} is there already; move it away, it would be replaced")
        if path is not None and method == "tiny":
            self._vae = self._vae.with_tiny_decoder()
            self._tiny = open_backend(bundle, "ort-cpu").make(self._vae.decoder)

    def show(self, step: Step) -> None:
        """Replace the preview by that of a sampler step, if it is time for one."""
        if self._path is None or step.denoised is None or step.index % max(step.total // PER_STAGE, 1):
            return
        picture = self._enlarged(step.denoised) if self._tiny is None else self._decoded(self._tiny, step.denoised)
        save_image(picture, self._path, {})

    def _enlarged(self, latents: Latents) -> Any:
        from PIL import Image  # noqa: PLC0415 - Pillow is loaded with the first picture

        small = Image.fromarray(approximate(latents, self._colours))
        factor = self._vae.factor
        return small.resize((small.width * factor, small.height * factor), Image.Resampling.BILINEAR)

    def _decoded(self, engine: Engine, latents: Latents) -> Any:
        from PIL import Image  # noqa: PLC0415 - Pillow is loaded with the first picture

        engine.load()  # does nothing from the second preview on
        height, width = latents.shape[2:]
        tile = choose_tile((height, width), None, self._vae.factor, tiled=True)
        samples = [decode_latents(engine, self._vae, one[np.newaxis], tile=tile) for one in latents]
        return Image.fromarray(np.concatenate([to_uint8(sample)[0] for sample in samples], axis=1))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._tiny is not None:
            self._tiny.unload()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
