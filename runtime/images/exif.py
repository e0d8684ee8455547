"""Texts in a picture's EXIF data: our settings, A1111's parameters, and the workflows that ComfyUI's nodes write."""

__all__ = ["EDITOR", "GRAPH", "MAKER", "MAX_TEXT", "UNICODE", "exif_texts"]

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

MAX_TEXT = 16 << 20
"""Longer texts are ignored; a workflow has kilobytes."""
GRAPH, EDITOR = "prompt", "workflow"
"""ComfyUI's names for a graph in API form, and for one in its editor's form."""
PARAMETERS, SETTINGS = "parameters", "sdxl-trt"
# The encoding of a comment is named in its first eight bytes (EXIF 2.3, section 4.6.5).
UNICODE, ASCII, MAKER = b"UNICODE\0", b"ASCII\0\0\0", b"sdxl-trt\0"
_UNDEFINED = bytes(8)
_USER_COMMENT, _MAKER_NOTE = 0x9286, 0x927C
_WINDOWS = range(0x9C9B, 0x9CA0)
"""XPTitle, XPComment and the like, in UTF-16."""
_NAMED = re.compile(rf"\s*({GRAPH}|{EDITOR})\s*:\s*(?=\{{)", re.IGNORECASE)


def exif_texts(main: Mapping[int, object], notes: Mapping[int, object]) -> dict[str, str]:
    """Return the texts in the tags of the `main` and `notes` (EXIF) directories, by the names they have in a PNG.

    ComfyUI writes ``prompt:{…}`` as the camera's model and ``workflow:{…}`` as its maker (SaveAnimatedWEBP); custom
    nodes write ``Workflow:{…}`` and ``Prompt:{…}`` into descriptions and comments, or one comment with both in a JSON
    object. All tags are searched, as ComfyUI's page does, and the first with a JSON object counts: a photograph
    described as "Prompt: a cat" is not a graph. The data is not trusted, and nothing is raised.
    """
    found: dict[str, str] = {}
    settings, comment = notes.get(_MAKER_NOTE), notes.get(_USER_COMMENT)
    if isinstance(settings, bytes) and settings.startswith(MAKER):
        found[SETTINGS] = settings.removeprefix(MAKER).decode("utf-8", "replace")
    for tag, value in (*main.items(), *notes.items()):
        text = _text(tag, value)
        if tag == _MAKER_NOTE or not 0 < len(text) <= MAX_TEXT:
            continue
        for name, graph in _graphs(text):
            found.setdefault(name, graph)
    if isinstance(comment, bytes) and comment.startswith((UNICODE, ASCII)):
        text = _text(_USER_COMMENT, comment)
        if not any(True for _ in _graphs(text)):
            found[PARAMETERS] = text
    return found


def _graphs(text: str) -> Iterator[tuple[str, str]]:
    """Yield (name, graph) for the graphs in a tag's text: one after its name and a colon, or members of an object."""
    if named := _NAMED.match(text):
        graph = text[named.end() :].rstrip("\0 \r\n")
        if _object(graph):
            yield named[1].lower(), graph
        return
    for name, value in _object(text).items():
        if name.lower() in (GRAPH, EDITOR):
            graph = value if isinstance(value, str) else json.dumps(value)
            if _object(graph):
                yield name.lower(), graph


def _object(text: str) -> dict[str, Any]:
    """Return `text` parsed as a JSON object, or an empty one if it is not one."""
    if not text.lstrip().startswith("{"):
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _text(tag: int, value: object) -> str:
    """Return the text of a tag's value, or "" if it is not text."""
    if (
        isinstance(value, tuple)
        and tag in _WINDOWS
        and all(isinstance(item, int) and 0 <= item < 256 for item in value)
    ):
        value = bytes(value)
    if isinstance(value, str):
        try:  # Pillow decodes bytes as Latin-1, but programs write UTF-8
            return value.encode("latin-1").decode("utf-8")
        except UnicodeError:
            return value
    if not isinstance(value, bytes) or len(value) > 4 * MAX_TEXT:
        return ""
    if tag in _WINDOWS:
        return value.decode("utf-16-le", "replace").rstrip("\0")
    for head in (ASCII, _UNDEFINED):
        if value.startswith(head):
            return value.removeprefix(head).decode("utf-8", "replace")
    return _utf16(value.removeprefix(UNICODE)) if value.startswith(UNICODE) else value.decode("utf-8", "replace")


def _utf16(content: bytes) -> str:
    """Return a comment decoded from UTF-16, in the byte order of its BOM, or else the one that gives more ASCII."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", "replace")
    little = content[1::2].count(0) > content[::2].count(0)
    return content.decode("utf-16-le" if little else "utf-16-be", "replace")
