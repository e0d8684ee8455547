"""Pictures and masks that clients send, brought to a size as A1111 does it, and finished pictures as files.

A mask is white where the picture changes. It is blurred, and reaches the latents as A1111 rounds it there. After the
decoding the original is laid over, except where the blurred mask is white. With `inpaint_full_res` a box around the
mask is drawn in the whole size, and put back. (`StableDiffusionProcessingImg2Img.init`, `masking.py`, `apply_overlay`.)
"""

__all__ = ["Paste", "Prepared", "control_picture", "encode", "opened", "prepare", "preview"]

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines.bundle import Manifest
from sdxl_trt.runtime.images import encode_image
from sdxl_trt.runtime.vae import approximate, colours_of
from sdxl_trt.server.a1111.body import AskedControl, AskedMask, AskedStart, invalid
from sdxl_trt.server.http import from_base64, read_picture
from sdxl_trt.server.options import Options

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = NDArray[np.uint8]
Size = tuple[int, int]
"""(height, width) in pixels."""
Box = tuple[int, int, int, int]
"""Left, top, right and bottom."""
_WHITE = 255
_MOST_SHOWN = 512
_MOST_SCALED = 1 << 26
"""Pixels of a picture that is scaled before it is cropped."""
_FILLS = ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1))
"""The radii with which the surroundings are blurred into a mask, and how often each is laid over."""


@dataclass(frozen=True, eq=False)
class Paste:
    """The original (RGBA, transparent where it changed), and the `box` of it that was drawn, None for all of it."""

    original: "Image"
    box: Box | None = None

    def onto(self, drawn: "Image") -> "Image":
        """Return the finished picture."""
        from PIL import Image  # noqa: PLC0415 - Pillow only where there is a picture

        if self.box is not None:
            left, top, right, bottom = self.box
            whole = Image.new("RGBA", self.original.size)
            whole.paste(resized(drawn, 1, (bottom - top, right - left)), (left, top))
            drawn = whole
        made = drawn.convert("RGBA")
        made.alpha_composite(self.original)
        return made.convert("RGB")


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a run starts from: pixels (h, w, 3), a mask (h, w) that is 255 where they change, and what is put back."""

    pixels: Pixels
    mask: Pixels | None = None
    paste: Paste | None = None


def opened(text: str, options: Options, field: str) -> "Image":
    """Return an untrusted picture, given as base64, turned as its EXIF data states. Raises ApiError."""
    from PIL import ImageOps  # noqa: PLC0415 - Pillow only where there is a picture

    return ImageOps.exif_transpose(read_picture(from_base64(text, options, field), options, field))


def prepare(start: AskedStart, size: Size, factor: int, options: Options) -> Prepared:
    """Return what a run of `size` starts from; `factor` is that of the latents. Raises ApiError."""
    image = _flat(opened(start.picture, options, "init_images"))
    if start.mask is None:
        return Prepared(np.asarray(resized(image, start.resize_mode, size)))
    return _masked(image, start.mask, start.resize_mode, size, factor, options)


def control_picture(control: AskedControl, size: Size, options: Options) -> Pixels:
    """Return the picture of a ControlNet in `size`."""
    image = opened(control.picture, options, "alwayson_scripts.controlnet.image")
    return np.asarray(resized(_flat(image), control.resize_mode, size))


def _flat(image: "Image") -> "Image":
    """Return a picture without transparency, on white."""
    from PIL import Image  # noqa: PLC0415 - Pillow only where there is a picture

    if not image.has_transparency_data:
        return image.convert("RGB")
    seen = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")


def resized(image: "Image", mode: int, size: Size) -> "Image":
    """Return `image` in `size`: 0 scales each side by itself, 1 covers it and crops, 2 fits into it and fills."""
    from PIL import Image  # noqa: PLC0415 - Pillow only where there is a picture

    lanczos, (height, width) = Image.Resampling.LANCZOS, size
    if mode == 0 or image.size == (width, height):
        return image.resize((width, height), lanczos)
    wider = width * image.height > height * image.width
    by_width = wider if mode == 1 else not wider and width * image.height != height * image.width
    across = width if by_width else max(image.width * height // image.height, 1)
    down = max(image.height * width // image.width, 1) if by_width else height
    if across * down > _MOST_SCALED:
        raise invalid("width", f"a picture of {image.width}x{image.height} is too narrow for one of {width}x{height}")
    scaled = image.resize((across, down), lanczos)
    left, top = width // 2 - across // 2, height // 2 - down // 2
    if mode == 1:
        return scaled.crop((-left, -top, width - left, height - top))
    sides = ((top, height - down - top), (left, width - across - left))
    pixels = np.asarray(scaled)
    return Image.fromarray(np.pad(pixels, (*sides, *([(0, 0)] * (pixels.ndim - 2))), mode="edge"))


def _masked(
    image: "Image", asked: AskedMask, mode: int, size: Size, factor: int, options: Options
) -> Prepared:  # fmt: skip
    from PIL import Image, ImageOps  # noqa: PLC0415 - Pillow only where there is a picture

    mask = _blurred(_grey(opened(asked.picture, options, "mask"), asked), asked.blur)
    if mask.size != image.size and not asked.whole:
        raise invalid("mask", f"has {mask.width}x{mask.height} pixels, and the picture {image.width}x{image.height};"
                              " make the mask of the picture's size")  # fmt: skip
    box = None
    if asked.whole:
        image, mask = (resized(each, mode, size) for each in (image, mask))
        shown = Image.fromarray(np.minimum(np.asarray(mask).astype(np.uint16) * 2, _WHITE).astype(np.uint8))
    else:
        box, shown = _around(np.asarray(mask), asked.padding, size), mask
    original = Image.new("RGBa", image.size)
    original.paste(image.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(shown))
    paste = Paste(original.convert("RGBA"), box)
    if box is not None:
        image, mask = (resized(each.crop(box), 2, size) for each in (image, mask))
    latents = _at_latents(mask, size, factor, rounded=asked.rounded)
    if not latents.any():
        raise invalid("mask", "nothing would change: paint white what is to change")
    return Prepared(np.asarray(_filled(image, mask) if asked.fill else image), latents, paste)


def _grey(mask: "Image", asked: AskedMask) -> "Image":
    from PIL import ImageOps  # noqa: PLC0415 - Pillow only where there is a picture

    # As in A1111, a mask that is transparent somewhere is its transparency.
    shown: Any = mask.convert("RGBA").getchannel("A") if mask.has_transparency_data else None
    if shown is None or shown.getextrema() == (_WHITE, _WHITE):
        shown = mask.convert("L")
    elif asked.rounded:
        shown = shown.point(lambda value: _WHITE if value > _WHITE // 2 + 1 else 0)
    found: Image = ImageOps.invert(shown) if asked.invert else shown
    return found


def _blurred(mask: "Image", blur: tuple[int, int]) -> "Image":
    from PIL import ImageFilter  # noqa: PLC0415 - Pillow only where there is a picture

    return mask.filter(ImageFilter.GaussianBlur(blur)) if any(blur) else mask


def _around(mask: Pixels, padding: int, size: Size) -> Box:
    """Return the box around all that is not black, with `padding`, widened to the shape of `size` where it can be."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        raise invalid("mask", "is black everywhere; paint white what is to change")
    high, wide = mask.shape
    left, right = max(int(columns[0]) - padding, 0), min(int(columns[-1]) + 1 + padding, wide)
    top, bottom = max(int(rows[0]) - padding, 0), min(int(rows[-1]) + 1 + padding, high)
    shape = size[1] / size[0]
    if (right - left) / (bottom - top) > shape:
        top, bottom = _widened(top, bottom, int((right - left) / shape), high)
    else:
        left, right = _widened(left, right, int((bottom - top) * shape), wide)
    return left, top, right, bottom


def _widened(first: int, last: int, wanted: int, most: int) -> tuple[int, int]:
    """Return a span that is `wanted` long with the old one in its middle, moved to within 0 and `most`."""
    more = max(wanted - (last - first), 0)
    first, last = first - more // 2, last + more - more // 2
    if last >= most:
        first, last = first - (last - most), most
    if first < 0:
        first, last = 0, last - first
    return first, min(last, most)


def _at_latents(mask: "Image", size: Size, factor: int, *, rounded: bool) -> Pixels:
    """Return the mask as A1111's latents have it, in blocks of pixels: how ever it is scaled down, it is the same."""
    small = np.asarray(mask.convert("RGB").resize((size[1] // factor, size[0] // factor)).getchannel(0))
    if rounded:
        small = np.where(small > _WHITE // 2, np.uint8(_WHITE), np.uint8(0))
    return small.repeat(factor, axis=0).repeat(factor, axis=1)


def _filled(image: "Image", mask: "Image") -> "Image":
    """Return a picture whose masked part is blurred out of what surrounds it."""
    from PIL import Image, ImageFilter, ImageOps  # noqa: PLC0415 - Pillow only where there is a picture

    made = Image.new("RGBA", image.size)
    kept = Image.new("RGBa", image.size)
    kept.paste(image.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask))
    for radius, times in _FILLS:
        blurred = kept.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(times):
            made.alpha_composite(blurred)
    return made.convert("RGB")


def encode(image: "Image", kind: str, texts: dict[str, str], quality: int) -> str:
    """Return a picture file as base64."""
    return base64.b64encode(encode_image(image, kind, texts, quality=quality)).decode()


def preview(latents: NDArray[np.float32], manifest: Manifest) -> str:
    """Return a rough PNG of clean latents (c, h, w) as base64, at most 512 pixels long."""
    from PIL import Image  # noqa: PLC0415 - Pillow only where there is a picture

    small = Image.fromarray(approximate(latents[None], colours_of(manifest)))
    scale = min(manifest.base.vae.factor, _MOST_SHOWN / max(small.size))
    size = (max(round(small.width * scale), 1), max(round(small.height * scale), 1))
    return encode(small.resize(size, Image.Resampling.BILINEAR), "PNG", {}, 100)
