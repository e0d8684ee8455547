"""A finished picture and how it is saved."""

__all__ = ["Picture"]

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_trt.runtime.arrays import Latents
from sdxl_trt.runtime.images.files import save_image
from sdxl_trt.runtime.images.metadata import describe

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Picture:
    """A finished picture; `image` (a Pillow image) and `latents` (c, h, w) belong to the caller.

    `graph` is a ComfyUI graph that makes it, if there is one.
    """

    image: "Image"
    seed: int
    metadata: Mapping[str, Any]
    latents: Latents
    graph: Mapping[str, Any] | None = None

    def save(self, path: Path | str, *, metadata: bool = True, replace: bool = True) -> None:
        """Write a picture file atomically, in the format of its extension: PNG, JPEG or WebP.

        With `metadata` it holds the settings from which the run can be repeated. Raises UsageError for another
        extension, and without `replace` FileExistsError if the file exists.
        """
        texts = describe(self.metadata, self.graph) if metadata else {}
        save_image(self.image, Path(path), texts, replace=replace)
