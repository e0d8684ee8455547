"""A1111's prompts: what they say, in the syntax of the runtime.

``(x)`` and ``[x]`` multiply and divide a weight by 1.1, ``(x:1.3)`` multiplies it by a number, ``\\(`` is a plain
parenthesis, ``<lora:name:0.8>`` names a LoRA, and the bare name of an embedding is that embedding. What changes a
prompt while it is drawn (``[a:b:0.5]``, ``[a|b]``), joins several (``AND``) or splits it (``BREAK``) is refused.
"""

__all__ = ["Prompt", "read_prompt"]

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from sdxl_trt.engines import UsageError
from sdxl_trt.runtime.adapters import LoraUse, split_tags, tags_of
from sdxl_trt.server.a1111.body.fields import invalid

STEP = 1.1
_PIECE = re.compile(r"\\[()\[\]\\]|:\s*(?P<weight>[+-]?[.\d]+)\s*\)|[()\[\]:\\]|[^\\()\[\]:]+")
_INNERMOST = re.compile(r"\[([^\[\]]*)\]")
_SCHEDULED = re.compile(r":\s*[-+]?[.\d]+\s*\Z")
_AND, _BREAK = re.compile(r"\bAND\b"), re.compile(r"\bBREAK\b")
_ESCAPED = re.compile(r"\\.", re.DOTALL)


@dataclass(frozen=True)
class Prompt:
    """A prompt: `text` is for ComfyUI's way, `plain` the same without weights, and `words` what is left of A1111's.

    `loras` have names, not paths. `weighted` says whether any weight is not 1.
    """

    text: str
    plain: str
    words: str
    loras: tuple[LoraUse, ...] = ()
    weighted: bool = False


def read_prompt(field: str, prompt: str, embeddings: Collection[str] = (), *, negative: bool = False) -> Prompt:
    """Return what `prompt` says; `embeddings` are the names of those that it may name.

    As in A1111, a negative prompt names no LoRAs. Raises ApiError (422) that names the field.
    """
    words, loras = prompt, tuple[LoraUse, ...]()
    if not negative and tags_of(prompt):
        try:
            words, loras = split_tags(prompt)
        except UsageError as exc:
            raise invalid(field, str(exc)) from exc
    _check(field, words, negative=negative)
    parts = [(_with_embeddings(text, embeddings), weight) for text, weight in _weighted(words)]
    weighted = any(weight != 1.0 for _, weight in parts)
    if not weighted and not any(mark in words for mark in "()[]\\"):
        plain = "".join(text for text, _ in parts)
        return Prompt(plain, plain, words, loras)
    return Prompt(_in_comfyui(parts), "".join(text for text, _ in parts), words, loras, weighted)


def _check(field: str, prompt: str, *, negative: bool) -> None:
    if _BREAK.search(prompt):
        raise invalid(field, "BREAK is not supported; leave it out")
    if not negative and _AND.search(prompt):
        raise invalid(field, "AND joins prompts in A1111, which is not supported; write and")
    if "embedding:" in prompt:
        raise invalid(field, "embedding:NAME is ComfyUI's; write the name of an embedding alone")
    left = _ESCAPED.sub("", prompt)
    while found := _INNERMOST.search(left):
        if "|" in found[1] or _SCHEDULED.search(found[1]):
            raise invalid(field, "words that change while the picture is drawn, [a:b:0.5] or [a|b], are not supported")
        left = left[: found.start()] + found[1] + left[found.end() :]


def _weighted(prompt: str) -> list[tuple[str, float]]:
    """Return the parts of a prompt with their weights, as A1111's parse_prompt_attention finds them."""
    parts: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(start: int, by: float) -> None:
        parts[start:] = [(text, weight * by) for text, weight in parts[start:]]

    for found in _PIECE.finditer(prompt):
        piece, weight = found[0], _number(found["weight"])
        if piece[0] == "\\" and len(piece) > 1:
            parts.append((piece[1], 1.0))
        elif piece in opened:
            opened[piece].append(len(parts))
        elif weight is not None and opened["("]:
            multiply(opened["("].pop(), weight)
        elif piece == ")" and opened["("]:
            multiply(opened["("].pop(), STEP)
        elif piece == "]" and opened["["]:
            multiply(opened["["].pop(), 1.0 / STEP)
        else:
            parts.append((piece, 1.0))
    for bracket, by in (("(", STEP), ("[", 1.0 / STEP)):
        for start in opened[bracket]:
            multiply(start, by)
    return [*_merged(parts)]


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _merged(parts: list[tuple[str, float]]) -> Iterator[tuple[str, float]]:
    """Yield parts in which neighbours of equal weight are one."""
    before: tuple[str, float] | None = None
    for text, weight in parts:
        if before is not None and before[1] == weight:
            before = before[0] + text, weight
        else:
            if before is not None:
                yield before
            before = text, weight
    if before is not None:
        yield before


def _in_comfyui(parts: list[tuple[str, float]]) -> str:
    """Return parts in ComfyUI's syntax, in which the number of the innermost parentheses is the weight."""
    written = ""
    for text, weight in parts:
        escaped = text.replace("(", "\\(").replace(")", "\\)")
        if weight == 1.0:
            written += escaped
        else:
            # A backslash before a parenthesis would make it a plain one.
            written += f"{' ' if written.endswith(chr(92)) else ''}({escaped}:{weight})"
    return written


def _with_embeddings(text: str, names: Collection[str]) -> str:
    """Return a text in which the names of embeddings, as words of their own, are marked for the runtime."""
    known = {name.lower(): name for name in names if name and not re.search(r"[\s<\[(:,]", name)}
    if not known:
        return text
    longest = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
    found = re.compile(rf"(?<!\w)({longest})(?!\w)", re.IGNORECASE)
    return found.sub(lambda match: f" embedding:{known[match[1].lower()]} ", text)
