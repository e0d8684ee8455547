"""Prompts in ComfyUI's syntax: weighted by parentheses, in as many chunks of 77 tokens as needed.

``(x)`` multiplies the weight by 1.1, also when nested; ``(x:1.3)`` sets it, and the innermost number wins; ``\\(`` is a
literal parenthesis. Unbalanced parentheses are text in the cases in which ComfyUI (comfy/sd1_clip.py) reads them so.
``embedding:name`` names a trained embedding, whose vectors take the place of tokens; one that is not found is left out.
"""

__all__ = ["Chunk", "Segment", "check_end", "chunked", "empty_chunk", "parse_weights", "weigh", "with_embeddings"]

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.bundle import Tokenizer
from sdxl_trt.runtime.adapters import Embedding, Embeddings
from sdxl_trt.runtime.text.vectors import PLACEHOLDER, Placed, Vector

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
    """A part of a prompt with one weight: a text, or an embedding."""

    text: str
    weight: float
    embedding: Embedding | None = None


@dataclass(frozen=True)
class Chunk:
    """One input row of an encoder: `ids` (max_length,) int64, framed and padded, each token's weight, and `vectors`.

    A vector replaces the token at its position, whose id is PLACEHOLDER or, where the prompt is pooled, the end's.
    """

    ids: NDArray[np.int64]
    weights: NDArray[np.float32]
    vectors: Placed = ()


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


def with_embeddings(segments: Sequence[Segment], embeddings: Embeddings) -> tuple[list[Segment], list[str]]:
    """Return `segments` with each embedding apart, and the names of those that `embeddings` lacks, which are left out.

    As in ComfyUI, the texts around an embedding are tokenized separately. Raises UsageError for an embedding without a
    name, and what `Embeddings.find` raises.
    """
    parts: list[Segment] = []
    missing: list[str] = []
    for segment in segments:
        for word in re.split(rf"\s(?={_EMBEDDING})", segment.text):
            if not word.startswith(_EMBEDDING):
                parts.append(Segment(word, segment.weight))
                continue
            found, name, rest = _named(word.removeprefix(_EMBEDDING), embeddings)
            if found is None:
                missing.append(name)
            else:
                parts.append(Segment("", segment.weight, found))
            parts.append(Segment(rest, segment.weight))
    return [part for part in parts if part.text or part.embedding], missing


def _named(text: str, embeddings: Embeddings) -> tuple[Embedding | None, str, str]:
    """Return the embedding that `text` begins with the name of, that name, and the rest of the text.

    A name ends at a blank, "<" or "["; commas around it belong to it only if a file has that name. In the rest, runs of
    blanks are reduced to one.
    """
    first, *others = text.split() or [""]
    name, opened = first, re.search(r"[<\[]", first)
    if opened is not None:
        name, others = first[: opened.start()], [first[opened.start() :], *others]
    stripped, rest = name.strip(","), " ".join(others)
    if not first:
        raise UsageError(f"the prompt has an {_EMBEDDING} without a name; remove it")
    found = embeddings.find(name)
    if found is None and stripped != name:
        found, name, rest = embeddings.find(stripped), stripped, f"{name[len(stripped) :]} {rest}"
    if found is None:
        embeddings.refuse_pickled(name)
    return found, name, rest


Token = int | Vector | None
"""A token's id, a vector in its place, or a place that an embedding for other encoders leaves."""


def chunked(
    segments: Sequence[Segment],
    tokenizer: Tokenizer,
    encode: Callable[[str], list[int]],
    vectors: Callable[[Embedding], Sequence[Vector | None]],
) -> list[Chunk]:
    """Return the chunks of a prompt's segments, at least one.

    `encode` returns the ids of a text without a frame, `vectors` an embedding's, each None if this encoder has none.
    """
    room = tokenizer.max_length - 2
    chunks: list[list[tuple[Token, float]]] = [[]]
    for segment in segments:
        found = encode(segment.text) if segment.embedding is None else vectors(segment.embedding)
        tokens: list[tuple[Token, float]] = [(token, segment.weight) for token in found]
        splits = len(tokens) >= LONG
        while len(tokens) + len(chunks[-1]) > room:
            taken = room - len(chunks[-1]) if splits else 0
            chunks[-1] += tokens[:taken]
            tokens = tokens[taken:]
            chunks.append([])
        chunks[-1] += tokens
    return [_framed(chunk, tokenizer) for chunk in chunks]


def empty_chunk(tokenizer: Tokenizer) -> Chunk:
    """Return the chunk of a prompt without tokens, which weights are relative to."""
    return _framed([], tokenizer)


def _framed(tokens: list[tuple[Token, float]], tokenizer: Tokenizer) -> Chunk:
    """Return the chunk of `tokens`.

    Tokens behind an embedding that has no vectors for this encoder move up; their weights do not, in ComfyUI either
    (SDClipModel.process_tokens counts the places, and then leaves them out).
    """
    ids = np.full(tokenizer.max_length, tokenizer.pad_id, dtype=np.int64)
    weights = np.ones(tokenizer.max_length, dtype=np.float32)
    weights[1 : len(tokens) + 1] = [weight for _, weight in tokens]
    kept = [token for token, _ in tokens if token is not None]
    plain = [PLACEHOLDER if isinstance(token, Vector) else token for token in kept]
    ids[: len(kept) + 2] = [tokenizer.bos_id, *plain, tokenizer.eos_id]
    placed = tuple((place, token) for place, token in enumerate(kept, start=1) if isinstance(token, Vector))
    chunk = Chunk(ids, weights, placed)
    check_end(chunk, tokenizer)
    return chunk


def check_end(chunk: Chunk, tokenizer: Tokenizer) -> None:
    """Raise UsageError for an end token before a vector: diffusers and ComfyUI would pool such a prompt elsewhere."""
    last = chunk.vectors[-1][0] if chunk.vectors else 0
    if (chunk.ids[:last] == tokenizer.eos_id).any():
        raise UsageError("the prompt has <|endoftext|> before an embedding; remove it")


def weigh(hidden: NDArray[np.float32], empty: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return `hidden` (tokens, width) scaled by `weights` (tokens,) relative to `empty`, the empty prompt's.

    A weight of 1 leaves a position bit-identical; the pooled prompt is never weighted.
    """
    column = weights[:, None]
    with np.errstate(over="ignore", invalid="ignore"):  # PromptEncoder checks the range
        weighed: NDArray[np.float32] = np.where(column == 1.0, hidden, (hidden - empty) * column + empty)
    return weighed
