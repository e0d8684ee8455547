"""CLIP tokenizers of a source folder, as one ``tokenizer.json`` each for the torch-free runtime."""

__all__ = ["LoadedTokenizer", "load_tokenizer"]

import json
from dataclasses import dataclass
from pathlib import Path

from sdxl_trt.engines.errors import SourceError

MAX_LENGTH = 77


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer's JSON (without padding and truncation, which the runtime does) and its framing ids."""

    json: bytes
    max_length: int
    bos_id: int
    eos_id: int
    pad_id: int


def load_tokenizer(folder: Path) -> LoadedTokenizer:
    """Load a CLIP tokenizer as transformers does, from ``tokenizer.json`` or from vocabulary and merges."""
    import transformers  # noqa: PLC0415 - seconds to import, and only when a tokenizer is read

    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise SourceError(f"{folder}: has neither tokenizer.json nor vocab.json; download the whole model folder")
    try:
        loaded = transformers.CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
        content = json.loads(loaded.backend_tokenizer.to_str())
    except Exception as exc:  # tokenizers raises bare Exception
        raise SourceError(f"{folder}: not a CLIP tokenizer ({exc}); download it again") from exc
    content["truncation"] = content["padding"] = None
    framing = (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id)
    if loaded.model_max_length < MAX_LENGTH or None in framing:
        raise SourceError(
            f"{folder}: SDXL's prompts are {MAX_LENGTH} ids with start, end and padding; this tokenizer has"
            f" model_max_length {loaded.model_max_length} and the ids {framing}"
        )
    compact = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    return LoadedTokenizer(compact, MAX_LENGTH, *framing)
