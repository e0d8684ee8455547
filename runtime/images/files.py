"""Picture files: write PNG, JPEG and WebP with texts in them, and read the texts of untrusted files."""

__all__ = ["FORMATS", "PARAMETERS", "SETTINGS", "WORKFLOW", "encode_image", "read_texts", "save_image"]

import io
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_trt.engines import UsageError, explain_os_error
from sdxl_trt.engines.host import atomic_write
from sdxl_trt.runtime.images.exif import EDITOR, GRAPH, MAKER, UNICODE, exif_texts

if TYPE_CHECKING:
    from PIL.Image import Exif, Image
    from PIL.PngImagePlugin import PngInfo

log = logging.getLogger("sdxl_trt.runtime")

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""File name extensions, and Pillow's names of their formats."""
PARAMETERS, SETTINGS = "parameters", "sdxl-trt"
"""The text for people and other programs, in A1111's format, and the JSON from which a run can be repeated."""
WORKFLOW = GRAPH
"""ComfyUI's name for the graph that made a picture, in API form."""

MAX_EXIF = 65_000
"""An EXIF segment of a JPEG holds 65 533 bytes."""
_EXIF, _USER_COMMENT, _MAKER_NOTE = 0x8769, 0x9286, 0x927C
_MODEL = 0x0110
"""The camera's model, where ComfyUI stores the graph of other formats than PNG, after the text's name and a colon."""
_FINE = 90
"""A JPEG of this quality keeps its colours in full resolution."""
_OPTIONS: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}


def format_of(path: Path) -> str:
    """Return Pillow's name of the format of a file's extension. Raises UsageError for an unsupported one."""
    try:
        return FORMATS[path.suffix.lower()]
    except KeyError:
        raise UsageError(f"{path}: give a name that ends in {', '.join(FORMATS)}") from None


def save_image(image: "Image", path: Path, texts: Mapping[str, str], *, replace: bool = True) -> None:
    """Write `image` atomically, in the format of the file's extension: JPEG in high quality, WebP lossless.

    `texts` is empty, or has PARAMETERS, SETTINGS and optionally WORKFLOW. A PNG stores each as a text chunk. EXIF data
    stores PARAMETERS as the user comment and WORKFLOW as the camera's model, where other programs look for them, and
    SETTINGS as the maker note; texts too long for EXIF are left out with a warning. Without `replace` an existing file
    is kept, and FileExistsError is raised.
    """
    kind = format_of(path)
    options = _OPTIONS.get(kind, {}) | _with_texts(kind, texts, str(path))
    with atomic_write(path, replace=replace) as file:
        image.save(file, format=kind, **options)


def encode_image(image: "Image", kind: str, texts: Mapping[str, str], *, quality: int = 100) -> bytes:
    """Return the bytes of a file of `kind`, one of the values of FORMATS, with `texts` in it as `save_image` has them.

    `quality`, 0 to 100, is that of a JPEG or a WebP; a WebP of 100 is lossless.
    """
    options: dict[str, Any] = {}
    if kind == "JPEG":
        options = {"quality": quality, "subsampling": 0 if quality >= _FINE else -1}
    elif kind == "WEBP":
        options = {"lossless": True} if quality == 100 else {"quality": quality}
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options, **_with_texts(kind, texts, "the picture"))
    return buffer.getvalue()


def _with_texts(kind: str, texts: Mapping[str, str], where: str) -> dict[str, Any]:
    """Return the arguments with which Pillow writes `texts`; texts too long for EXIF are left out with a warning."""
    if kind == "PNG":
        return {"pnginfo": _chunks(texts)}
    if not texts:
        return {}
    exif = _exif(texts)
    if len(exif.tobytes()) <= MAX_EXIF:
        return {"exif": exif}
    log.warning("%s: the settings are too long for EXIF and are left out; a .png keeps them", where)
    return {}


def read_texts(picture: Path | bytes) -> dict[str, str]:
    """Return the texts in a picture, given as a file or as its bytes, by their names in a PNG.

    For a JPEG or WebP these are PARAMETERS, SETTINGS, WORKFLOW and EDITOR, as `exif_texts` finds them. The pixels are
    not decoded, and the data is not trusted. Raises UsageError if it is not a picture.
    """
    from PIL import Image  # noqa: PLC0415 - Pillow only where there is a picture

    name = "standard input" if isinstance(picture, bytes) else str(picture)
    source = io.BytesIO(picture) if isinstance(picture, bytes) else picture
    try:
        # Pillow warns of sizes that would be expensive to decode.
        with (
            warnings.catch_warnings(action="ignore"),
            Image.open(source, formats=[*dict.fromkeys(FORMATS.values())]) as image,
        ):
            texts = {str(key): text for key, text in image.info.items() if isinstance(text, str)}
            if image.format == "PNG" and (texts.keys() & {SETTINGS, WORKFLOW, EDITOR} or "exif" not in image.info):
                return texts
            exif = image.getexif()
            found = exif_texts(exif, exif.get_ifd(_EXIF))
            return found | texts if image.format == "PNG" else found
    except OSError as exc:
        if exc.errno is not None:
            raise explain_os_error(exc, f"reading {name}") from exc
        raise UsageError(f"{name}: is not a PNG, JPEG or WebP picture; give one that trt-generate made") from exc
    except Exception as exc:  # a decoder may raise anything for an untrusted file
        raise UsageError(f"{name}: is a broken picture ({str(exc)[:100]}); give an intact copy of it") from exc


def _chunks(texts: Mapping[str, str]) -> "PngInfo":
    from PIL.PngImagePlugin import PngInfo  # noqa: PLC0415 - Pillow is loaded with the first picture

    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    return info


def _exif(texts: Mapping[str, str]) -> "Exif":
    from PIL.Image import Exif  # noqa: PLC0415 - Pillow is loaded with the first picture

    exif = Exif()
    notes = exif.get_ifd(_EXIF)
    notes[_USER_COMMENT] = UNICODE + texts[PARAMETERS].encode("utf-16-be")
    notes[_MAKER_NOTE] = MAKER + texts[SETTINGS].encode()
    if WORKFLOW in texts:
        exif[_MODEL] = f"{WORKFLOW}:{texts[WORKFLOW]}"
    return exif
