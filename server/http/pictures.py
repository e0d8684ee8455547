"""Pictures that clients send: untrusted files, decoded within limits."""

__all__ = ["from_base64", "read_picture"]

import base64
import binascii
import io
import re

from PIL import Image

from sdxl_trt.server.http.errors import ApiError
from sdxl_trt.server.options import Options

FORMATS = ("PNG", "JPEG", "WEBP")
_DATA_URL = re.compile(r"data:image/(?:png|jpe?g|webp);base64,", re.IGNORECASE)
_BLANKS = str.maketrans("", "", " \t\r\n")


def read_picture(data: bytes, options: Options, field: str) -> Image.Image:
    """Return the picture of an untrusted file, decoded; `field` is its name in errors.

    Raises ApiError (400) unless it is one whole PNG, JPEG or WebP frame of at most `options.max_pixels` pixels.
    """
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise _invalid(field, f"has more than {options.max_pixels} pixels; send a smaller picture") from exc
    except Exception as exc:  # Pillow's readers raise errors of many classes for damaged files
        raise _invalid(field, "is no PNG, JPEG or WebP picture") from exc
    if picture.width * picture.height > options.max_pixels:
        raise _invalid(field, f"is {picture.width}x{picture.height}, more than {options.max_pixels} pixels; send a "
                              "smaller picture")  # fmt: skip
    # A JPEG of the kind MPO is a photo with a preview behind it: its first frame is the picture.
    if getattr(picture, "n_frames", 1) != 1 and picture.format != "MPO":
        raise _invalid(field, "is animated; send one frame")
    try:
        picture.load()
    except Exception as exc:
        raise _invalid(field, "is damaged or cut off") from exc
    return picture


def from_base64(text: str, options: Options, field: str) -> bytes:
    """Return the bytes of base64 text, with or without "data:image/…;base64," in front and line ends in it.

    Raises ApiError: 413 if it is longer than any body may be, 400 if it is no base64, or a URL.
    """
    if len(text) * 3 // 4 > options.max_body:
        raise ApiError(413, f"{field}: is longer than {options.max_body} bytes", "body_too_large", param=field)
    if found := _DATA_URL.match(text):
        text = text[found.end() :]
    elif ":" in text[:64]:
        raise _invalid(field, "is a URL, which is not fetched; send the picture as base64")
    try:
        return base64.b64decode(text.translate(_BLANKS), validate=True)
    except (binascii.Error, ValueError) as exc:
        raise _invalid(field, "is no base64 text") from exc


def _invalid(field: str, what: str) -> ApiError:
    return ApiError(400, f"{field}: {what}", "invalid_image", param=field)
