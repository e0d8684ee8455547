"""Prompts as ComfyUI reads them: weighted by parentheses, in as many chunks of 77 tokens as they take.

``(x)`` raises the weight by a tenth and nests by multiplying, ``(x:1.3)`` states it, an inner statement wins, ``\\(``
is a parenthesis of the text. What is not balanced is text, as far as ComfyUI (comfy/sd1_clip.py) takes it for that.
``embedding:name`` stands for a trained embedding; there are none here, and as in ComfyUI a missing one is left out.
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
"""What a pair of parentheses without a number does to a weight."""
MAX_DEPTH = 64
LONG = 8
"""A segment of as many tokens may be split between two chunks; a shorter one moves to the next as a whole."""
_EMBEDDING = "embedding:"
# Stand for escaped parentheses while the others are read; no prompt holds them: the shell passes no NUL.
_OPEN, _CLOSE = "\0\1", "\0\2"


@dataclass(frozen=True)
class Segment:
    """A part of a prompt with one weight."""

    text: str
    weight: float


@dataclass(frozen=True)
class Chunk:
    """What an encoder reads at once: `ids` (max_length,) int64, framed and padded, and each token's weight."""

    ids: NDArray[np.int64]
    weights: NDArray[np.float32]


def parse_weights(prompt: str) -> list[Segment]:
    """Return the parts of `prompt` in their order. Raises UsageError for parentheses nested deeper than MAX_DEPTH."""
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
    """Cut `text` before and after each outermost group; the cuts of unbalanced text are ComfyUI's."""
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
    """Return what stands before a last colon and the number after it; the whole and None where there is none."""
    text, colon, number = inner.rpartition(":")
    if not colon or not text:
        return inner, None
    try:
        weight = float(number)
    except ValueError:
        return inner, None
    return text, weight


def without_embeddings(segments: Sequence[Segment]) -> tuple[list[Segment], list[str]]:
    """Return the parts of `segments` around embeddings, each of which ComfyUI tokenizes by itself, and their names.

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
    """Return the name that `text` begins with, and what follows it: a comma is not the name's, blanks become one."""
    first, *others = text.split() or [""]
    name, rest = first.strip(","), " ".join(others)
    if not first:
        raise UsageError(f"the prompt has an {_EMBEDDING} without a name; take it out")
    return name, rest if name == first else f"{first[len(name) :]} {rest}"


def chunked(segments: Sequence[Segment], tokenizer: Tokenizer, encode: Callable[[str], list[int]]) -> list[Chunk]:
    """Return the chunks of a prompt's segments, one at least; `encode` gives the ids of a text without a frame."""
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
    """Return `hidden` (tokens, width) moved away from `empty`, the empty prompt's, by `weights` (tokens,).

    A weight of 1 leaves a position as it is, to the bit; the pooled prompt is never weighed.
    """
    column = weights[:, None]
    with np.errstate(over="ignore", invalid="ignore"):  # whoever takes them looks whether it can hold them
        weighed: NDArray[np.float32] = np.where(column == 1.0, hidden, (hidden - empty) * column + empty)
    return weighed
