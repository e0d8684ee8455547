"""What clients read: the answer, its pictures, its usage, and the list of models."""

__all__ = ["Answered", "Usage", "answer", "error_body", "model", "models"]

import base64
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sdxl_trt.server.http import ApiError
from sdxl_trt.server.openai.body import Asked

_TYPES = {401: "authentication_error", 403: "authentication_error", 429: "rate_limit_error"}
_QUALITIES = {"auto": "medium", "standard": "medium", "hd": "high"}
"""What an answer calls these: the schema of OpenAI's own answers has no other word for them."""
Link = Callable[[bytes], str]
"""Keeps a picture's file for a while, and returns the URL at which it can be fetched."""


@dataclass(frozen=True)
class Usage:
    """The tokens of the prompts, before any are cut off; pictures take no tokens here."""

    text_tokens: int

    def as_json(self) -> dict[str, Any]:
        """Return it in OpenAI's form."""
        return {
            "input_tokens": self.text_tokens,
            "output_tokens": 0,
            "total_tokens": self.text_tokens,
            "input_tokens_details": {"image_tokens": 0, "text_tokens": self.text_tokens},
        }


@dataclass(frozen=True)
class Answered:
    """A finished picture as the answer has it: its file, its seed and its (width, height)."""

    file: bytes
    seed: int
    size: tuple[int, int]


def answer(asked: Asked, pictures: Sequence[Answered], created: int, usage: Usage, warnings: Sequence[str],
           link: Link) -> dict[str, Any]:  # fmt: skip
    """Return the body of an answer; `created` is in seconds since 1970."""
    return {
        "created": created,
        "data": [data_of(asked, each.file, link) for each in pictures],
        **facts(asked, pictures[0].size),
        "usage": usage.as_json(),
        "seeds": [each.seed for each in pictures],
        "warnings": list(warnings),
    }


def data_of(asked: Asked, file: bytes, link: Link) -> dict[str, str]:
    """Return one picture of an answer: base64, a URL, or both."""
    data = {"b64_json": base64.b64encode(file).decode()} if asked.as_base64 else {}
    return data | ({"url": link(file)} if asked.as_url else {})


def facts(asked: Asked, size: tuple[int, int]) -> dict[str, str]:
    """Return what an answer and every event say of the pictures; `size` is (width, height)."""
    return {
        "size": f"{size[0]}x{size[1]}",
        "quality": _QUALITIES.get(asked.quality, asked.quality),
        "background": "opaque",
        "output_format": asked.output.format,
    }


def error_body(exc: ApiError) -> dict[str, Any]:
    """Return the body of an error."""
    kind = _TYPES.get(exc.status, "server_error" if exc.status >= 500 else "invalid_request_error")
    return {"error": {"message": exc.message, "type": kind, "param": exc.param or None, "code": exc.code}}


def model(name: str, created: int) -> dict[str, Any]:
    """Return one model as /v1/models/{id} says it."""
    return {"id": name, "object": "model", "created": created, "owned_by": "sdxl-trt"}


def models(names: Iterable[str], created: int) -> dict[str, Any]:
    """Return the list of /v1/models."""
    return {"object": "list", "data": [model(name, created) for name in names]}
