"""Bodies of requests: JSON and forms, read within limits.

The size of a body and the time that it takes are limited below (see `limits`): what is read here is in memory.
"""

__all__ = ["Part", "parse_json", "read_form", "read_json"]

import json
import math
import re
from dataclasses import dataclass
from typing import Any, NoReturn

from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from sdxl_trt.server.http.errors import ApiError

MAX_DEPTH, MAX_TOKENS = 64, 200_000
MAX_PARTS, MAX_FIELD, MAX_HEAD, MAX_BOUNDARY = 64, 1 << 20, 8 << 10, 200
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[\[\]{},]', re.DOTALL)
"""A text, or a sign between values. A text without an end is one token, so that the search stays linear."""
_STEP = {b"[": 1, b"{": 1, b"]": -1, b"}": -1}
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass
class Part:
    """A part of a multipart body; `filename` is None for a field, and never a path of this machine."""

    name: str
    filename: str | None
    data: bytes


async def read_json(request: Request) -> dict[str, Any]:
    """Return the JSON object that a request's body is, whatever its Content-Type says.

    Raises ApiError: 400 if it is none, 413 or 408 if it is too large or too slow.
    """
    return parse_json(await request.body())


def parse_json(data: bytes) -> dict[str, Any]:
    """Return the JSON object of `data`; raises ApiError (400) if it is none, or names a key twice."""
    _check_structure(data)
    try:
        body = json.loads(
            data.decode("utf-8-sig"), object_pairs_hook=_object, parse_constant=_not_finite, parse_float=_finite
        )
        if _SURROGATE.search(data):
            json.dumps(body, ensure_ascii=False).encode()
    except UnicodeError as exc:
        raise _invalid("is not valid UTF-8 text") from exc
    except json.JSONDecodeError as exc:
        raise _invalid(f"is not JSON: {exc.msg} at character {exc.pos}") from exc
    except (ValueError, RecursionError) as exc:
        raise _invalid("has a number that is too long") from exc
    if not isinstance(body, dict):
        raise _invalid("is not a JSON object; send {…}")
    return body


def _check_structure(data: bytes) -> None:
    """Refuse what would take much more memory as Python's objects than as text, before it is parsed."""
    depth = 0
    for count, token in enumerate(_TOKEN.finditer(data)):
        depth += _STEP.get(token[0], 0)
        if depth > MAX_DEPTH:
            raise _invalid(f"is nested too deeply; at most {MAX_DEPTH} levels are read")
        if count > MAX_TOKENS:
            raise _invalid("has too many values")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise _invalid("names a key twice")
    return made


def _not_finite(_: str) -> NoReturn:
    raise _invalid("has a number that is not finite")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        _not_finite(text)
    return number


async def read_form(request: Request) -> list[Part]:
    """Return the parts of a multipart body, in order.

    Raises ApiError: 415 if the body is of another type; 400 if it is damaged or cut off, has more than 64 parts, or a
    field of more than 1 MiB; 413 or 408 if it is too large or too slow.
    """
    kind, settings = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data":
        raise ApiError(415, "send a multipart/form-data body", "unsupported_media")
    boundary = settings.get(b"boundary", b"")
    if not 1 <= len(boundary) <= MAX_BOUNDARY:
        raise _invalid("is multipart without a boundary in its Content-Type")
    return [_part(section) for section in _sections(await request.body(), b"\r\n--" + boundary)]


def _sections(data: bytes, delimiter: bytes) -> list[bytes]:
    """Return what stands between the delimiters: the first may be the very beginning, the last ends in two dashes.

    A form that is cut off lacks the last: readers that do not ask for it lose a part in silence.
    """
    data = b"\r\n" + data
    if data.count(delimiter) > MAX_PARTS + 1:
        raise _invalid(f"has more than {MAX_PARTS} parts")
    _, *sections = data.split(delimiter)
    if not sections or not sections[-1].startswith(b"--"):
        raise _invalid("is a damaged form: its last boundary is missing")
    return sections[:-1]


def _part(section: bytes) -> Part:
    end = section.find(b"\r\n\r\n", 0, MAX_HEAD)
    name = filename = None
    for line in section[: max(end, 0)].split(b"\r\n"):
        field, _, value = line.partition(b":")
        if field.strip().lower() == b"content-disposition":
            settings = parse_options_header(value.strip())[1]
            name, filename = settings.get(b"name"), settings.get(b"filename")
    if name is None:
        raise _invalid("is a damaged form: a part has no name")
    data = section[end + 4 :]
    if filename is None and len(data) > MAX_FIELD:
        raise _invalid("has a field of more than 1 MiB; send pictures as files")
    return Part(_text(name), None if filename is None else _text(filename), data)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "replace")


def _invalid(what: str) -> ApiError:
    return ApiError(400, f"the body {what}", "invalid_value")
