"""Embeddings in a prompt as diffusers reads them: `embedding:name` is a placeholder token.

Equal to ``load_textual_inversion(vectors, token="embedding:name")`` on each encoder for which the file has vectors, in
the order in which a prompt names them. The placeholder of several vectors becomes as many tokens before the prompt is
cut. An encoder without vectors of its own reads the word as text.
"""

__all__ = ["Piece", "has_words", "row_of", "split_placeholders"]

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.bundle import Tokenizer
from sdxl_trt.runtime.adapters import Embedding, Embeddings
from sdxl_trt.runtime.text.vectors import PLACEHOLDER, Vector
from sdxl_trt.runtime.text.weighting import Chunk, check_end

_WORD = re.compile(r"(?<!\w)embedding:(\S{1,255})")
_SHOWN = 80
Vectors = Callable[[Embedding], Sequence[Vector | None]]


@dataclass(frozen=True)
class Piece:
    """A part of a prompt as it is written; with an `embedding`, `text` is its placeholder."""

    text: str
    embedding: Embedding | None = None


def has_words(text: str) -> bool:
    """Return whether a prompt has a word of the form `embedding:name`."""
    return _WORD.search(text) is not None


def split_placeholders(text: str, embeddings: Embeddings) -> list[Piece]:
    """Return the pieces of `text` around its placeholders; all of it is one piece without a folder of embeddings.

    A name ends at a blank, or before punctuation if no file's name goes on: the longest name that has a file is taken.
    Raises UsageError if there is none.
    """
    pieces: list[Piece] = []
    start = 0
    while embeddings.folder is not None and (match := _WORD.search(text, start)):
        name, found = _longest(match[1], embeddings)
        pieces.append(Piece(text[start : match.start()]))
        start = match.start(1) + len(name)
        pieces.append(Piece(text[match.start() : start], found))
    return [*pieces, Piece(text[start:])]


def _longest(run: str, embeddings: Embeddings) -> tuple[str, Embedding]:
    ends = (end for end in range(len(run), 0, -1) if end == len(run) or not (run[end].isalnum() or run[end] in "_-"))
    for name in (run[:end] for end in ends):
        found = embeddings.find(name)
        if found is not None:
            return name, found
    plain = run.rstrip(".,;:!?()[]{}\"'")
    embeddings.refuse_pickled(plain)
    raise UsageError(f"embedding:{plain[:_SHOWN]}: {embeddings.folder} has no {plain[:_SHOWN]}.safetensors; check the"
                     " name, or remove the word from the prompt")  # fmt: skip


def row_of(
    pieces: Sequence[Piece], vectors: Vectors, spec: Tokenizer, encode: Callable[[str], list[int]], *, at_largest: bool
) -> tuple[Chunk, int]:
    """Return the row of a prompt, cut to the tokenizer's length, and the number of tokens that are cut off.

    `vectors` returns an embedding's for this encoder; `encode` returns the ids of a text. With `at_largest` the encoder
    pools at a row's largest id, as transformers does for SDXL's configs, which state eos_token_id 2: then it is the id
    of the embedding that was loaded last.
    """
    tokens = [*_tokens(pieces, vectors, encode)]
    room = spec.max_length - 2
    kept = tokens[:room]
    ids = np.full(spec.max_length, spec.pad_id, np.int64)
    plain = [PLACEHOLDER if isinstance(token, Vector) else token for token in kept]
    ids[: len(kept) + 2] = [spec.bos_id, *plain, spec.eos_id]
    placed = tuple((place, token) for place, token in enumerate(kept, start=1) if isinstance(token, Vector))
    chunk = Chunk(ids, np.ones(spec.max_length, np.float32), placed)
    check_end(chunk, spec)
    if at_largest and placed:
        ids[_last_loaded(chunk, tokens)] = spec.eos_id
    return chunk, len(tokens) - len(kept)


def _tokens(pieces: Sequence[Piece], vectors: Vectors, encode: Callable[[str], list[int]]) -> Iterator[int | Vector]:
    """Yield the tokens of a prompt; a placeholder without vectors for this encoder is text like what is around it."""
    known = [(piece, [each for each in vectors(piece.embedding) if each] if piece.embedding else [])
             for piece in pieces]  # fmt: skip
    for is_text, group in groupby(known, key=lambda each: not each[1]):
        if is_text:
            yield from encode("".join(piece.text for piece, _ in group))
        else:
            yield from (vector for _, own in group for vector in own)


def _last_loaded(chunk: Chunk, tokens: Sequence[int | Vector]) -> int:
    """Return the first position of the vector whose added token has the largest id: ids are given while loading."""
    order: dict[Embedding, int] = {}
    for token in tokens:
        if isinstance(token, Vector):
            order.setdefault(token.embedding, len(order))
    return max(chunk.vectors, key=lambda each: (order[each[1].embedding], each[1].row, -each[0]))[0]
