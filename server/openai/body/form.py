"""The parts of an edit: its fields, its picture and its mask."""

__all__ = ["Form", "sorted_parts"]

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from sdxl_trt.server.openai.body.fields import invalid

PICTURES = ("image", "image[]")
MASKS = ("mask", "mask[]")


class Part(Protocol):
    """A part of a multipart body, as `http.read_form` gives it; `filename` is None for a field."""

    name: str
    filename: str | None
    data: bytes


@dataclass
class Form:
    """The fields of an edit by name, the files of its pictures and of its masks, and what was dropped."""

    fields: dict[str, str] = field(default_factory=dict)
    pictures: list[bytes] = field(default_factory=list)
    masks: list[bytes] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def sorted_parts(parts: Iterable[Part]) -> Form:
    """Return the parts of a form by what they are.

    Versions of LiteLLM send, beside the file, a field of the file's name with Python's text for it: fields with the
    names of files are dropped, and named in the warnings. Raises ApiError (400) for a field that is there twice or is
    no text, and for a file under another name.
    """
    form = Form()
    for part in parts:
        files = form.pictures if part.name in PICTURES else form.masks if part.name in MASKS else None
        if part.filename is not None:
            if files is None:
                raise invalid(part.name[:40], "is a file, and this endpoint takes files as image and mask alone")
            files.append(part.data)
        elif files is not None:
            form.warnings.append(f"{part.name}: a text of this name was dropped; only files are taken")
        else:
            _add_field(form, part)
    return form


def _add_field(form: Form, part: Part) -> None:
    name = part.name[:40]
    if part.name in form.fields:
        raise invalid(name, "is given twice; give it once")
    try:
        form.fields[part.name] = part.data.decode()
    except UnicodeDecodeError as exc:
        raise invalid(name, "is not valid UTF-8 text") from exc
