"""Names of files: what a client may call a picture, and what a picture is called in answers.

No name is ever joined to a path: names are keys of a table.
"""

__all__ = ["FileKey", "named_in_graph", "numbered", "output_name", "upload_key", "wanted_key"]

import re
import secrets
import string
from typing import NamedTuple

from sdxl_trt.server.http import ApiError

KINDS = ("input", "output", "temp")
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
_LONGEST = 255
_LONGEST_KEPT = 100
_DEEPEST = 4
_MARK = re.compile(r" \[(input|output|temp)\]$")
_STRANGE = re.compile(r"[^A-Za-z0-9_.-]+")
_REFUSED = re.compile(r"[\x00-\x1f\x7f\\:]")
_ENCODED = re.compile(r"%(?:00|2e|2f|5c|25)", re.IGNORECASE)
"""What would be a part of a path, were it decoded once more."""
_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


class FileKey(NamedTuple):
    """A picture in the table of one client: `kind` is "input", "output" or "temp"."""

    kind: str
    subfolder: str
    name: str


def wanted_key(filename: str, kind: str, subfolder: str) -> FileKey:
    """Return what a client asks for; the name may end in a mark such as " [input]".

    Raises ApiError: 400 for what no file is called, 403 for a folder that would lie outside.
    """
    marked = _MARK.search(filename)
    if marked is not None:
        filename, kind = filename[: marked.start()], marked[1]
    if kind not in KINDS:
        raise ApiError(400, f"type: choose one of {', '.join(KINDS)}", "invalid_value", param="type")
    _check(filename, "filename")
    if not filename or ".." in filename or "/" in filename:
        raise ApiError(400, "filename: give the name of a file, without folders", "invalid_value", param="filename")
    _check(subfolder, "subfolder")
    if subfolder.startswith("/") or ".." in subfolder.split("/"):
        raise ApiError(403, "subfolder: lies outside of the folder", "forbidden", param="subfolder")
    return FileKey(kind, subfolder.strip("/"), filename)


def named_in_graph(file: str) -> FileKey | None:
    """Return what a LoadImage names, by default an upload, with its subfolder before a "/"; None for no such name."""
    folder, _, name = _MARK.sub("", file).rpartition("/")
    marked = _MARK.search(file)
    try:
        return wanted_key(name, marked[1] if marked else "input", folder)
    except ApiError:
        return None


def upload_key(filename: str, subfolder: str) -> FileKey:
    """Return how an upload is called: with plain characters, and the ending of a picture.

    Raises ApiError (400) for a name or a subfolder that is not plain.
    """
    _check(filename, "image")
    parts = [part for part in subfolder.split("/") if part]
    plain = all(_PLAIN.fullmatch(part) and ".." not in part for part in parts)
    if subfolder.startswith("/") or not plain or len(parts) > _DEEPEST or len(subfolder) > _LONGEST_KEPT:
        raise ApiError(400, "subfolder: give a plain name, of letters, digits, '_', '-' and '.'", "invalid_value",
                       param="subfolder")  # fmt: skip
    if not filename or ".." in filename or "/" in filename:
        raise ApiError(400, "image: give the name of a file, without folders", "invalid_value", param="image")
    name = _tamed(filename)
    stem, dot, ending = name.rpartition(".")
    if not stem or f"{dot}{ending}".lower() not in ENDINGS:
        stem, dot, ending = name, ".", "png"
    return FileKey("input", "/".join(parts), f"{stem[:_LONGEST_KEPT]}{dot}{ending}")


def numbered(key: FileKey, number: int) -> FileKey:
    """Return the name of an upload whose name is taken `number` times."""
    stem, dot, ending = key.name.rpartition(".")
    return key._replace(name=f"{stem}_{number}{dot}{ending}")


def output_name(prefix: str, number: int, *, preview: bool = False) -> str:
    """Return the file name of picture `number` that a SaveImage with `prefix`, or a PreviewImage, shows."""
    if preview:
        prefix = "ComfyUI_temp_" + "".join(secrets.choice(string.ascii_lowercase) for _ in range(5))
    stem = _tamed(prefix)[:_LONGEST_KEPT] or "ComfyUI"
    return f"{stem}_{number:05}_.png"


def _check(text: str, field: str) -> None:
    if len(text) > _LONGEST or _REFUSED.search(text) or _ENCODED.search(text):
        raise ApiError(400, f"{field}: is not the plain name of a file", "invalid_value", param=field)


def _tamed(text: str) -> str:
    """Return `text` with "_" for every other character than plain ones, and no dots at its start or in a row."""
    return re.sub(r"\.{2,}", ".", _STRANGE.sub("_", text)).strip(".")
