"""CLIP's BPE vocabulary, stored once as compressed merge rules, and the tokenizer files derived from it."""

__all__ = ["merges", "special_tokens_map", "tokenizer_config", "vocabulary"]

import lzma
from functools import lru_cache
from pathlib import Path
from typing import Any

from sdxl_trt.mini.architecture import TOKENS

MERGES_FILE = Path(__file__).with_name("clip_merges.txt.xz")
START, END = "<|startoftext|>", "<|endoftext|>"


def byte_symbols() -> list[str]:
    """One printable character per byte value, in the order of CLIP's vocabulary (same as GPT-2's)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    hidden = [value for value in range(256) if value not in printable]
    return [chr(value) for value in printable] + [chr(256 + i) for i in range(len(hidden))]


@lru_cache
def merges() -> tuple[str, ...]:
    """The 48,894 merge rules, each two symbols separated by a space, most frequent first."""
    return tuple(lzma.decompress(MERGES_FILE.read_bytes()).decode().splitlines())


def vocabulary() -> dict[str, int]:
    """Symbol to id: 256 bytes, the same bytes at a word's end, the merges in order, then the two special tokens."""
    symbols = byte_symbols()
    symbols += [symbol + "</w>" for symbol in symbols]
    symbols += [rule.replace(" ", "") for rule in merges()]
    return {symbol: i for i, symbol in enumerate([*symbols, START, END])}


def tokenizer_config(pad: str) -> dict[str, Any]:
    """tokenizer_config.json as SDXL publishes it: `pad` is the first tokenizer's end token, the second's "!"."""
    return {
        "add_prefix_space": False,
        "bos_token": _special(START),
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "eos_token": _special(END),
        "errors": "replace",
        "model_max_length": TOKENS,
        "pad_token": pad,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": _special(END),
    }


def special_tokens_map(pad: str) -> dict[str, Any]:
    """special_tokens_map.json, as SDXL publishes it."""
    tokens = {"bos_token": START, "eos_token": END, "unk_token": END}
    maps: dict[str, Any] = {name: _added(text, normalized=name != "unk_token") for name, text in tokens.items()}
    return {**maps, "pad_token": pad}


def _special(content: str) -> dict[str, Any]:
    return {"__type": "AddedToken", **_added(content, normalized=True)}


def _added(content: str, normalized: bool) -> dict[str, Any]:
    return {
        "content": content,
        "lstrip": False,
        "normalized": normalized,
        "rstrip": False,
        "single_word": False,
    }
