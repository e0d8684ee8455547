"""Masks: the part of a picture that changes, read from untrusted files; the canvas of an outpainting; the paste.

White changes and black stays. A mask is the luminance of a picture; its transparency is not used.
"""

__all__ = ["InputMask", "Margins", "Overlay", "as_mask", "outpainted", "read_channel", "read_mask"]

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.host import known_as
from sdxl_trt.runtime.images.inputs import (
    FILE_FORMATS,
    MAX_PIXELS,
    WHITE,
    InputPicture,
    Size,
    decoded_pixels,
    file_content,
)

if TYPE_CHECKING:
    from PIL.Image import Image

Margins = tuple[int, int, int, int]
"""Pixels that are added to a picture on its left, top, right and bottom."""
Grey = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class InputMask:
    """A mask, uint8 (height, width), 255 where the picture changes, with its file name ("" without a file) and digest.

    `array` is not written to. `grey` says whether the file has no colours, so that each of its channels is the mask.
    """

    array: Grey
    name: str
    sha256: str
    grey: bool = True

    @property
    def size(self) -> Size:
        """Return (height, width)."""
        return self.array.shape[0], self.array.shape[1]


def as_mask(mask: InputMask | NDArray[Any]) -> InputMask:
    """Return `mask`, or a bool or uint8 array (height, width) as one, with the digest of its values.

    Raises UsageError for another array.
    """
    if isinstance(mask, InputMask):
        return mask
    array = np.asarray(mask)
    if array.ndim != 2 or not array.size or array.dtype not in (np.bool_, np.uint8):
        raise UsageError(f"mask: an array of {array.dtype} {list(array.shape)} is not a mask; give bool or uint8"
                         " (height, width)")  # fmt: skip
    grey = array * np.uint8(WHITE) if array.dtype == np.bool_ else array
    return InputMask(grey, "", hashlib.sha256(grey.tobytes()).hexdigest())


def read_mask(path: Path, option: str = "--mask") -> InputMask:
    """Return the luminance of the picture in a file: PNG, JPEG, WebP, GIF or BMP, turned as its EXIF data states.

    Raises UsageError that names `option` and the file, as `read_input` does.
    """
    from PIL import Image  # noqa: PLC0415 - Pillow only where there is a picture

    where = f"{option} {path}"
    content = file_content(path, where)
    colours = decoded_pixels(content, where, FILE_FORMATS)
    grey = np.asarray(Image.fromarray(colours).convert("L"))
    is_grey = bool((colours == grey[..., None]).all())
    return InputMask(grey, known_as(path), hashlib.sha256(content).hexdigest(), is_grey)


def read_channel(path: Path, where: str, channel: str) -> Grey | None:
    """Return the "red", "green", "blue" or "alpha" channel (h, w) of the picture in a file; None without that alpha.

    Raises UsageError that starts with `where`, as `read_input` does.
    """

    def take(picture: "Image", where: str) -> Grey:  # noqa: ARG001 - the reader passes it
        if channel == "alpha" and not picture.has_transparency_data:
            return np.empty((0, 0), np.uint8)
        return np.asarray(picture.convert("RGBA").getchannel(channel[0].upper()))

    found = decoded_pixels(file_content(path, where), where, FILE_FORMATS, take)
    return found if found.size else None


def outpainted(picture: InputPicture, mask: InputMask | None, margins: Margins) -> tuple[InputPicture, Grey]:
    """Return the canvas that `margins` make of `picture`, and its mask: white margins around `mask`, or around black.

    The margins repeat the picture's edge: a start without seams, for strengths that leave something of it. The canvas
    keeps the name and the digest of the picture. Raises UsageError for latents, which have no edge to repeat.
    """
    if picture.pixels is None:
        raise UsageError("--outpaint adds pixels around a picture, and latents have none; give a picture with --image")
    left, top, right, bottom = margins
    high, wide = picture.pixels.shape[0] + top + bottom, picture.pixels.shape[1] + left + right
    if high * wide > MAX_PIXELS:
        raise UsageError(f"--outpaint {left},{top},{right},{bottom}: makes a picture of {wide}x{high}, more than"
                         f" {MAX_PIXELS} pixels; give smaller margins")  # fmt: skip
    sides = (top, bottom), (left, right)
    canvas = replace(picture, array=np.pad(picture.pixels, (*sides, (0, 0)), mode="edge"))
    inner = np.zeros(picture.pixels.shape[:2], np.uint8) if mask is None else mask.array
    return canvas, np.pad(inner, sides, constant_values=WHITE)


class Overlay:
    """Pastes the original back over a decoded picture, except where a blurred mask is white.

    `original` is uint8 (h, w, 3) and `mask` uint8 (h, w), of the same size; `blur` is the radius in pixels of the
    Gaussian that softens the mask's edge, 0 for a hard one. Neither array is written to.
    """

    def __init__(self, original: NDArray[np.uint8], mask: Grey, blur: int) -> None:
        self._original = original
        self._alpha = _blurred(np.where(mask > WHITE // 2, np.uint8(WHITE), np.uint8(0)), blur)

    def onto(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return new pixels (h, w, 3): those of the original, bit for bit, where the blurred mask is black."""
        share = self._alpha[..., None].astype(np.float32) / np.float32(WHITE)
        mixed = self._original + (pixels.astype(np.float32) - self._original) * share
        result: NDArray[np.uint8] = np.rint(mixed).astype(np.uint8)
        return result


def _blurred(mask: Grey, blur: int) -> Grey:
    if not blur:
        return mask
    from PIL import Image, ImageFilter  # noqa: PLC0415 - Pillow only where there is a picture

    return np.asarray(Image.fromarray(mask).filter(ImageFilter.GaussianBlur(blur)))
