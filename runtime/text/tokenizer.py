"""Tokenize prompts for a CLIP text encoder."""

__all__ = ["PromptTokenizer"]

import functools
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines import CorruptError, UsageError
from sdxl_trt.engines.bundle import Bundle, verify_file


class PromptTokenizer:
    """A CLIP tokenizer of a bundle: 77 ids a prompt (Long-CLIP: 248), framed, truncated and padded as in transformers.

    Raises CorruptError if the file does not match the manifest, or is not a tokenizer.
    """

    def __init__(self, bundle: Bundle, name: str) -> None:
        self.spec = bundle.manifest.tokenizers[name]
        path = bundle.path(self.spec.file)
        verify_file(path, self.spec.file)
        try:
            self._tokenizer = _parsed(path.read_bytes())
        except Exception as exc:  # tokenizers raises bare Exception
            raise CorruptError(f"{path}: not a tokenizer ({exc}); run export-engines again") from exc

    def ids(self, text: str) -> NDArray[np.int64]:
        """Return ids (max_length,): start, prompt, end, padding."""
        room = self.spec.max_length - 2
        body = self._encode(text).ids[:room]
        framed = [self.spec.bos_id, *body, self.spec.eos_id]
        return np.array(framed + [self.spec.pad_id] * (room - len(body)), dtype=np.int64)

    def pieces(self, text: str) -> list[int]:
        """Return the ids of the whole `text`, without start, end and padding."""
        return list(self._encode(text).ids)

    def cut_off(self, text: str) -> str:
        """Return the part of `text` that `ids` cuts off; "" if all of it fits."""
        encoding = self._encode(text)
        room = self.spec.max_length - 2
        if len(encoding.ids) <= room:
            return ""
        return text[encoding.offsets[room][0] :].strip() or json.dumps(encoding.tokens[room:])

    def _encode(self, text: str) -> Any:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except TypeError as exc:  # lone surrogates, which stand for a shell's bytes that are not UTF-8
            raise UsageError("the prompt is not valid Unicode text; give it as UTF-8") from exc


@functools.lru_cache(maxsize=2)
def _parsed(content: bytes) -> Any:
    """Return the tokenizer that a file holds; those of the latest pair are kept, since it is never changed.

    Parsing CLIP's takes longer than a small pair's whole prompt, and a bundle that is exported and opened anew nearly
    always has the same two. Raises what the library raises.
    """
    from tokenizers import Tokenizer  # noqa: PLC0415 - a compiled library, loaded with the first prompt

    text = content.decode()
    made = _with_the_model_of_another(text) or Tokenizer.from_str(text)
    _latest[:] = [(text, made)]
    return made


_latest: list[tuple[str, Any]] = []
"""The tokenizer that was parsed last, and its text."""


def _with_the_model_of_another(text: str) -> Any | None:
    """Return the tokenizer of `text` made from the last one, if only their added tokens differ; else None.

    The two of SDXL differ in what pads a prompt. Half of the time of reading them goes into the second copy of the
    vocabulary and the merges.
    """
    from tokenizers import AddedToken, Tokenizer  # noqa: PLC0415

    if not _latest:
        return None
    known, other = _latest[0]
    try:
        (tokens, rest), (_, others) = _added_tokens(text), _added_tokens(known)
    except ValueError:
        return None
    if rest != others or other.truncation is not None or other.padding is not None:
        return None
    made = Tokenizer(other.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if getattr(other, part) is not None:
            setattr(made, part, getattr(other, part))
    for token in tokens:
        flags = {name: token[name] for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        made.add_tokens([AddedToken(token["content"], **flags)])
    # A token that the vocabulary lacks gets the next free id, which may not be the file's.
    found = {number: token.content for number, token in made.get_added_tokens_decoder().items()}
    return made if found == {token["id"]: token["content"] for token in tokens} else None


def _added_tokens(text: str) -> tuple[list[dict[str, Any]], str]:
    """Return the added tokens of a tokenizer's text, and the text without them; raises ValueError if unsure."""
    if text.count('"added_tokens"') != 1:
        raise ValueError("a word of the vocabulary could pass for the list")
    start = text.index("[", text.index('"added_tokens"'))
    tokens, end = json.JSONDecoder().raw_decode(text, start)
    return tokens, text[:start] + text[end:]
