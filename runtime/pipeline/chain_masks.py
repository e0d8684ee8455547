"""The masks of a workflow and the pictures they are made from: files are read first, and nodes computed when needed."""

__all__ = ["ChainMasks"]

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.host import known_as, sha256_file
from sdxl_trt.runtime.comfyui import (
    Image,
    Loaded,
    Mask,
    Padded,
    PictureFiles,
    Scaled,
    load_channel,
    load_image,
    loaded_name,
)
from sdxl_trt.runtime.images import MAX_PIXELS, InputPicture, new_size, resize
from sdxl_trt.runtime.pipeline.mask_nodes import canvas, canvas_mask, cropped_mask, feathered, grown, scaled_mask
from sdxl_trt.runtime.pipeline.record import FileFact

Values = NDArray[np.float32]
Size = tuple[int, int]
NO_TRANSPARENCY = 64, 64
"""The size of LoadImage's black mask of a picture without transparency."""
MOST_SIDE = 16384
"""ComfyUI's largest side of a picture that a node makes."""


class ChainMasks:
    """Masks (h, w) from 0 to 1, and pixels (1, 3, h, w) of pictures that no sampler makes; files are in `folder`,
    or in a table.

    `factor` is the pixels of a latent.
    """

    def __init__(self, folder: PictureFiles, factor: int) -> None:
        self._folder, self._factor = folder, factor
        self.pictures: dict[str, InputPicture] = {}
        """The pictures that were read, by their names in the workflow."""
        self.facts: dict[str, FileFact] = {}
        """What a record says of the files that were read, by their names in the workflow."""
        self._channels: dict[tuple[str, str], Values] = {}
        self._done: dict[Mask, Values] = {}

    def read(self, source: Mask | Image) -> None:
        """Read the file that a node names, if it is one that does. Raises UsageError."""
        if isinstance(source, Loaded) and source.file not in self.pictures:
            picture = load_image(source, self._folder)
            self.pictures[source.file] = picture
            self.facts[source.file] = FileFact(name=picture.name, sha256=picture.sha256)
        if isinstance(source, Mask) and source.file:
            values, path = load_channel(source, self._folder, NO_TRANSPARENCY)
            self._channels[source.file, source.channel] = values
            name = known_as(path) if isinstance(self._folder, Path) else loaded_name(source.file)
            self.facts[source.file] = FileFact(name=name, sha256=sha256_file(path))

    def check(self, source: Mask | Image) -> None:
        """Raise UsageError, before anything is computed, for what would be larger than any picture that is loaded.

        What the source is made of has been checked before.
        """
        if not isinstance(source, Mask | Padded | Scaled):
            return
        high, wide = self._size_of_mask(source) if isinstance(source, Mask) else self._size(source)
        # A scaled side takes a matrix of its old length times its new one.
        if high * wide > MAX_PIXELS or (isinstance(source, Scaled) and max(high, wide) > MOST_SIDE):
            raise UsageError(f"node {source.node}: makes {wide}x{high}, more than {MAX_PIXELS} pixels or"
                             f" {MOST_SIDE} on a side; choose a smaller size")  # fmt: skip

    def _size(self, image: Image) -> Size:
        """Return the (height, width) of an image, (0, 0) if a sampler makes it."""
        if isinstance(image, Loaded):
            return self.pictures[image.file].size or (0, 0)
        if isinstance(image, Padded):
            (left, top, right, bottom), (high, wide) = image.margins, self._size(image.image)
            return high + top + bottom, wide + left + right
        if isinstance(image, Scaled) and (before := self._size(image.image)) != (0, 0):
            return new_size(before, image.size, image.by, 1, 1)
        return 0, 0

    def _size_of_mask(self, mask: Mask) -> Size:
        if mask.kind == "solid":
            return int(mask.values[2]), int(mask.values[1])
        if mask.image is not None:
            return self._size(mask.image)
        # Files have been read, and were not too large.
        return (0, 0) if mask.mask is None else self._size_of_mask(mask.mask)

    def pixels(self, image: Image) -> Values:
        """Return the pixels of an image that is made from files alone."""
        if isinstance(image, Loaded):
            pixels: NDArray[Any] = self.pictures[image.file].array
            return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255.0))
        if isinstance(image, Padded):
            return canvas(self.pixels(image.image), image.margins)
        if isinstance(image, Scaled):
            before = self.pixels(image.image)
            size = new_size((before.shape[2], before.shape[3]), image.size, image.by, 1, 1)
            return resize(before, size, image.method, centred=image.centred)
        raise UsageError(f"node {image.node}: decodes what a sampler makes, where a loaded picture is expected")

    def mask(self, mask: Mask) -> Values:
        """Return the values of a mask."""
        if mask not in self._done:
            self._done[mask] = self._made(mask)
        return self._done[mask]

    def _made(self, mask: Mask) -> Values:
        if mask.file:
            return self._channels[mask.file, mask.channel]
        if mask.kind == "solid":
            value, width, height = mask.values
            return np.full((int(height), int(width)), value, np.float32)
        return self._changed(mask, self.mask(mask.mask)) if mask.mask is not None else self._of_image(mask)

    def _of_image(self, mask: Mask) -> Values:
        if isinstance(mask.image, Padded):
            high, wide = self.pixels(mask.image.image).shape[2:]
            return canvas_mask((high, wide), mask.image.margins, int(mask.values[0]))
        assert mask.image is not None  # noqa: S101 - every other kind has a mask or a file
        channel: Values = self.pixels(mask.image)[0, ("red", "green", "blue").index(mask.channel)]
        return channel

    def _changed(self, mask: Mask, before: Values) -> Values:
        if mask.kind == "inverted":
            return np.float32(1.0) - before
        if mask.kind == "grown":
            return grown(before, int(mask.values[0]), tapered=bool(mask.values[1]))
        if mask.kind == "feathered":
            left, top, right, bottom = map(int, mask.values)
            return feathered(before, (left, top, right, bottom))
        assert mask.image is not None  # noqa: S101 - "fitted" is made for one
        high, wide = self.pixels(mask.image).shape[2:]
        return self._cropped(before, (high, wide))

    def fitted(self, mask: Mask, size: tuple[int, int]) -> Values:
        """Return a mask scaled to a picture of `size` (height, width), and cut as that is cut before it is encoded."""
        return self._cropped(self.mask(mask), size)

    def _cropped(self, mask: Values, size: tuple[int, int]) -> Values:
        return cropped_mask(scaled_mask(mask, size), self._factor)
