"""Prompts in ComfyUI's syntax: weighted by parentheses, in as many chunks of 77 tokens as needed.

``(x)`` multiplies the weight by 1.1, also when nested; ``(x:1.3)`` sets it, and the innermost number wins; ``\\(`` is a
literal parenthesis. Unbalanced parentheses are text in the cases in which ComfyUI (comfy/sd1_clip.py) reads them so.
``embedding:name`` names a trained embedding; none are supported here, and it is left out like one ComfyUI lacks.
"""

__all__ = ["Chunk", "Segment", "chunked", "parse_weights", "weigh", "without_embeddings"]

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.bundle import Tokenizer

STEP = 1.1
"""The factor on the weight of a pair of parentheses without a number."""
MAX_DEPTH = 64
LONG = 8
"""A segment of at least this many tokens may be split between two chunks; a shorter one moves to the next whole."""
_EMBEDDING = "embedding:"
# Replace escaped parentheses during parsing; no prompt contains them, since a shell passes no NUL.
_OPEN, _CLOSE = "\0\1", "\0\2"


@dataclass(frozen=True)
class Segment:
    """A part of a prompt with one weight."""

    text: str
    weight: float


@dataclass(frozen=True)
class Chunk:
    """One input row of an encoder: `ids` (max_length,) int64, framed and padded, and each token's weight."""

    ids: NDArray[np.int64]
    weights: NDArray[np.float32]


def parse_weights(prompt: str) -> list[Segment]:
    """Return the parts of `prompt` in order. Raises UsageError for parentheses nested deeper than MAX_DEPTH."""
    hidden = prompt.replace("\0", " ").replace("\\)", _CLOSE).replace("\\(", _OPEN)
    return [
        Segment(text.replace(_CLOSE, ")").replace(_OPEN, "("), weight) for text, weight in _weighted(hidden, 1.0, 0)
    ]


def _weighted(text: str, weight: float, depth: int) -> list[tuple[str, float]]:
    if depth > MAX_DEPTH:
        raise UsageError(
            f"the prompt nests parentheses deeper than {MAX_DEPTH}; write (words:1.3), or \\( for a plain one"
        )
    parts: list[tuple[str, float]] = []
    for item in _split(text):
        if len(item) >= 2 and item[0] == "(" and item[-1] == ")":
            inner, stated = _stated(item[1:-1])
            parts += _weighted(inner, weight * STEP if stated is None else stated, depth + 1)
        else:
            parts.append((item, weight))
    return parts


def _split(text: str) -> list[str]:
    """Split `text` before and after each outermost group; unbalanced text is split as in ComfyUI."""
    items: list[str] = []
    start = depth = 0
    for i, char in enumerate(text):
        if char == "(":
            if depth == 0 and i > start:
                items.append(text[start:i])
                start = i
            depth += 1
        elif char == ")":
            depth -= 1
            if depth == 0:
                items.append(text[start : i + 1])
                start = i + 1
    return [*items, text[start:]] if start < len(text) else items


def _stated(inner: str) -> tuple[str, float | None]:
    """Return the text before the last colon and the number after it; all of it and None if there is no number."""
    text, colon, number = inner.rpartition(":")
    if not colon or not text:
        return inner, None
    try:
        weight = float(number)
    except ValueError:
        return inner, None
    return text, weight


def without_embeddings(segments: Sequence[Segment]) -> tuple[list[Segment], list[str]]:
    """Return the parts of `segments` around embeddings, which ComfyUI tokenizes separately, and the embeddings' names.

    Raises UsageError for an embedding without a name.
    """
    parts, names = [], []
    for segment in segments:
        for word in re.split(f"[ \n](?={_EMBEDDING})", segment.text):
            text = word
            if word.startswith(_EMBEDDING):
                name, text = _embedding(word.removeprefix(_EMBEDDING))
                names.append(name)
            if text:
                parts.append(Segment(text, segment.weight))
    return parts, names


def _embedding(text: str) -> tuple[str, str]:
    """Return the name that `text` begins with, without commas, and the rest, with runs of blanks reduced to one."""
    first, *others = text.split() or [""]
    name, rest = first.strip(","), " ".join(others)
    if not first:
        raise UsageError(f"the prompt has an {_EMBEDDING} without a name; remove it")
    return name, rest if name == first else f"{first[len(name) :]} {rest}"


def chunked(segments: Sequence[Segment], tokenizer: Tokenizer, encode: Callable[[str], list[int]]) -> list[Chunk]:
    """Return the chunks of a prompt's segments, at least one; `encode` returns the ids of a text without a frame."""
    room = tokenizer.max_length - 2
    chunks: list[list[tuple[int, float]]] = [[]]
    for segment in segments:
        tokens = [(token, segment.weight) for token in encode(segment.text)]
        splits = len(tokens) >= LONG
        while len(tokens) + len(chunks[-1]) > room:
            taken = room - len(chunks[-1]) if splits else 0
            chunks[-1] += tokens[:taken]
            tokens = tokens[taken:]
            chunks.append([])
        chunks[-1] += tokens
    return [_framed(chunk, tokenizer) for chunk in chunks]


def _framed(tokens: list[tuple[int, float]], tokenizer: Tokenizer) -> Chunk:
    ids = np.full(tokenizer.max_length, tokenizer.pad_id, dtype=np.int64)
    weights = np.ones(tokenizer.max_length, dtype=np.float32)
    ids[0], ids[len(tokens) + 1] = tokenizer.bos_id, tokenizer.eos_id
    if tokens:
        ids[1 : len(tokens) + 1], weights[1 : len(tokens) + 1] = zip(*tokens, strict=True)
    return Chunk(ids, weights)


def weigh(hidden: NDArray[np.float32], empty: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return `hidden` (tokens, width) scaled by `weights` (tokens,) relative to `empty`, the empty prompt's.

    A weight of 1 leaves a position bit-identical; the pooled prompt is never weighted.
    """
    column = weights[:, None]
    with np.errstate(over="ignore", invalid="ignore"):  # PromptEncoder checks the range
        weighed: NDArray[np.float32] = np.where(column == 1.0, hidden, (hidden - empty) * column + empty)
    return weighed
