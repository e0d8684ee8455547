"""Pictures to start from: read from untrusted files, and cropped or scaled to the size of a run.

A file is read once, whole, up to MAX_BYTES, and the bytes that were hashed are decoded. Only FORMATS are tried, for
local files also GIF and BMP, and one frame of at most MAX_PIXELS; arrays of latents are read without numpy's pickles.
"""

__all__ = [
    "FILE_FORMATS",
    "MAX_PIXELS",
    "WHITE",
    "Fit",
    "InputPicture",
    "Size",
    "as_input",
    "check_input",
    "decoded_pixels",
    "file_content",
    "fitted",
    "read_input",
]

import hashlib
import logging
import math
import stat
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from sdxl_trt.engines import UsageError, explain_os_error
from sdxl_trt.engines.bundle import Manifest
from sdxl_trt.engines.host import known_as

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger("sdxl_trt.runtime")

MAX_BYTES = 256 << 20
MAX_PIXELS = 89_478_485
"""Pillow's own limit, beyond which it only warns."""
FORMATS = ("PNG", "JPEG", "WEBP")
FILE_FORMATS = (*FORMATS, "GIF", "BMP")
"""The formats of a file that the command line or a workflow names."""
_TEXT = {FORMATS: "PNG, JPEG or WebP", FILE_FORMATS: "PNG, JPEG, WebP, GIF or BMP"}
WHITE = 255
_NPY, _ZIP = npy.MAGIC_PREFIX, b"PK\x03\x04"
_KEPT = "final.npy"
Size = tuple[int, int]
Take = Callable[["Image", str], NDArray[np.uint8]]
"""Takes pixels out of a decoded picture; the text names its file in errors."""
Fit = Literal["scale", "crop", "cover"]
"""How a picture is fitted to a size: "scale" scales each side by itself, as diffusers does to reach a multiple; "crop"
keeps the centre, as ComfyUI does; "cover" scales the picture to cover the size and keeps the centre."""


@dataclass(frozen=True, eq=False)
class InputPicture:
    """A picture to start from, with its file name ("" without a file) and the digest of its content.

    `array` is uint8 (height, width, 3), or latents float32 (count, channels, height/8, width/8) like `Run.final`. It
    is not written to.
    """

    array: NDArray[Any]
    name: str
    sha256: str

    @property
    def pixels(self) -> NDArray[np.uint8] | None:
        """Return the pixels (height, width, 3), or None for latents."""
        return self.array if self.array.dtype == np.uint8 else None

    @property
    def latents(self) -> NDArray[np.float32] | None:
        """Return the latents (count, channels, h, w), which need no encoding, or None for pixels."""
        return self.array if self.array.dtype == np.float32 else None

    @property
    def size(self) -> Size | None:
        """Return (height, width) of pixels, None for latents."""
        return None if self.pixels is None else (self.pixels.shape[0], self.pixels.shape[1])


def as_input(picture: InputPicture | NDArray[Any]) -> InputPicture:
    """Return `picture` with a digest, for an array that of its values. Raises UsageError for an unsuitable array."""
    if isinstance(picture, InputPicture):
        return picture
    array = np.asarray(picture)
    _check(array, "image")
    return InputPicture(array, "", hashlib.sha256(array.tobytes()).hexdigest())


def read_input(path: Path, option: str = "--image") -> InputPicture:
    """Return the picture in a file of FILE_FORMATS, or latents: the array `final` of an .npz, or the array of an .npy.

    The picture is rotated as its EXIF data states. With a warning, transparency is dropped and 16-bit grey is clipped
    at 255, as in diffusers and ComfyUI, and the first frame of an animated GIF is used. Raises UsageError that names
    `option` and the file, if it is missing, too large, otherwise animated, broken, or in another format.
    """
    where = f"{option} {path}"
    content = file_content(path, where)
    array = (
        _latents(content, where) if content.startswith((_NPY, _ZIP)) else decoded_pixels(content, where, FILE_FORMATS)
    )
    _check(array, where)
    return InputPicture(array, known_as(path), hashlib.sha256(content).hexdigest())


def check_input(picture: InputPicture, manifest: Manifest, count: int, size: Size, *, refine: bool) -> InputPicture:
    """Return `picture` after checking that `count` pictures of `size` (height, width) can start from it.

    With `refine` they start in the refiner. Raises UsageError for pixels if the bundle has no encoder, and for latents
    of another size.
    """
    vae = manifest.refiner.vae if manifest.refiner is not None and refine else manifest.base.vae
    if picture.pixels is not None and vae.encoder is None:
        raise UsageError("a picture must be encoded, but the bundle has no VAE encoder; export the bundle with it:"
                         " export-engines without --components")  # fmt: skip
    if picture.latents is not None:
        given, fitting = picture.latents.shape, (vae.latent_channels, size[0] // vae.factor, size[1] // vae.factor)
        if given[0] not in (1, count) or given[1:] != fitting:
            raise UsageError(f"the latents to start from have shape {list(given)}; for {count} picture(s) of"
                             f" {size[1]}x{size[0]} give {[count, *fitting]}")  # fmt: skip
    return picture


def fitted(pixels: NDArray[np.uint8], size: Size, way: Fit) -> NDArray[np.uint8]:
    """Return `pixels` (h, w, 3), or a mask (h, w), fitted to `size` (height, width); scaling is Lanczos."""
    height, width = size
    if pixels.shape[:2] == size:
        return pixels
    if way == "crop":
        top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
        return pixels[top : top + height, left : left + width]
    from PIL import Image, ImageOps  # noqa: PLC0415 - Pillow only where there is a picture

    picture, lanczos = Image.fromarray(pixels), Image.Resampling.LANCZOS
    if way == "cover":
        return np.asarray(ImageOps.fit(picture, (width, height), lanczos))
    return np.asarray(picture.resize((width, height), lanczos))


def file_content(path: Path, where: str) -> bytes:
    """Return the bytes of a file of at most MAX_BYTES. Raises UsageError that starts with `where`."""
    try:
        # A pipe might never end, and a device is not a picture.
        if not stat.S_ISREG(path.stat().st_mode):
            raise UsageError(f"{where}: is not a file; give a picture")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as exc:
        raise explain_os_error(exc, where) from exc
    except ValueError as exc:
        raise UsageError(f"{where}: no file can have this name; check the path") from exc
    if len(content) > MAX_BYTES:
        raise UsageError(f"{where}: larger than {MAX_BYTES >> 20} MiB; give a smaller picture")
    return content


def decoded_pixels(
    content: bytes, where: str, formats: tuple[str, ...] = FORMATS, take: "Take | None" = None
) -> NDArray[np.uint8]:
    """Return the pixels (h, w, 3) of a picture file's content, turned as its EXIF data states, or what `take` returns.

    Raises UsageError that starts with `where` for content that is broken, animated, too large or in another format.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError  # noqa: PLC0415 - Pillow only where there is a picture

    try:
        # Pillow warns of what is refused below, and of palettes that it converts anyway.
        with warnings.catch_warnings(action="ignore"), Image.open(BytesIO(content), formats=formats) as picture:
            _check_picture(picture, where)
            return (take or _rgb)(ImageOps.exif_transpose(picture), where)
    except (UsageError, MemoryError):
        raise
    except (UnidentifiedImageError, Image.DecompressionBombError) as exc:
        what = f"not a {_TEXT[formats]} picture" if isinstance(exc, UnidentifiedImageError) else "a picture of too many"
        more = "" if isinstance(exc, UnidentifiedImageError) else f" pixels, more than {MAX_PIXELS}"
        raise UsageError(f"{where}: is {what}{more}; give another one") from exc
    except Exception as exc:  # a decoder may raise anything for an untrusted file
        raise UsageError(f"{where}: is a broken picture ({_reason(exc)}); give an intact copy of it") from exc


def _check_picture(picture: "Image", where: str) -> None:
    """Raise UsageError for a picture that is too large or animated, before its pixels are decoded."""
    if picture.width * picture.height > MAX_PIXELS:
        raise UsageError(f"{where}: is a picture of {picture.width}x{picture.height}, more than {MAX_PIXELS} pixels;"
                         " give a smaller one")  # fmt: skip
    if picture.format == "GIF":
        if getattr(picture, "is_animated", False):
            log.warning("%s: is animated; its first frame is used (ComfyUI's LoadImage uses all of them)", where)
    # A camera's MPO is a JPEG whose other frames are previews and depth maps of the first.
    elif getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO":
        raise UsageError(f"{where}: is animated; give a single frame of it")


def _rgb(picture: "Image", where: str) -> NDArray[np.uint8]:
    if picture.mode.startswith("I"):
        # 16-bit grey; Pillow itself reduces 16-bit colours to 8 bits.
        deep = np.asarray(picture)
        if deep.max() > WHITE:
            log.warning("%s: is 16-bit grey, in which all values above 255 become white, as in diffusers and ComfyUI;"
                        " save it with 8 bits", where)  # fmt: skip
        return np.repeat(np.clip(deep, 0, WHITE).astype(np.uint8)[:, :, None], 3, axis=2)
    if picture.has_transparency_data and np.asarray(picture.convert("RGBA"))[:, :, 3].min() < 255:
        log.warning("%s: is transparent in places; the transparency is dropped, and the colours are used", where)
    return np.array(picture.convert("RGB"))


def _latents(content: bytes, where: str) -> NDArray[Any]:
    try:
        stored = _unpacked(content, where) if content.startswith(_ZIP) else content
        return _array(stored)
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as exc:
        raise UsageError(f"{where}: holds no latents ({_reason(exc)}); give a .npy of them, or a file that"
                         " --save-latents wrote") from exc  # fmt: skip


def _unpacked(content: bytes, where: str) -> bytes:
    """Return the file of the last latents in an .npz; at most MAX_BYTES are unpacked, whatever its header claims."""
    with zipfile.ZipFile(BytesIO(content)) as archive, archive.open(_KEPT) as file:
        stored = file.read(MAX_BYTES + 1)
    if len(stored) > MAX_BYTES:
        raise UsageError(f"{where}: holds more than {MAX_BYTES >> 20} MiB; give a smaller array")
    return stored


def _array(stored: bytes) -> NDArray[Any]:
    """Return the array of an .npy. Raises ValueError if its header does not match its bytes."""
    file = BytesIO(stored)
    version = npy.read_magic(file)
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read_header(file)
    if dtype != np.float32:
        raise ValueError(f"of type {dtype}, not float32")
    values = np.frombuffer(stored, np.float32, offset=file.tell())
    if any(side < 0 for side in shape) or math.prod(shape) != values.size:
        raise ValueError(f"shape {shape} with {values.size} values")
    return values.reshape(shape, order="F" if fortran else "C")


def _reason(exc: Exception) -> str:
    return " ".join(str(exc).split())[:100]


def _check(array: NDArray[Any], where: str) -> None:
    if array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3 and array.size:
        return
    if array.dtype == np.float32 and array.ndim == 4 and array.size and np.isfinite(array).all():
        return
    raise UsageError(f"{where}: an array of {array.dtype} {list(array.shape)} is not a picture; give uint8 (height,"
                     " width, 3), or finite float32 latents (count, channels, height, width)")  # fmt: skip
