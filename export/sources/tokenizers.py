"""CLIP tokenizers of a source folder, each as one ``tokenizer.json`` for the torch-free runtime."""

__all__ = ["LoadedTokenizer", "load_tokenizer", "tokenizer_files"]

import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sdxl_trt.engines import SourceError, explain_os_error
from sdxl_trt.engines.host import is_utf8
from sdxl_trt.engines.plans import TOKENS
from sdxl_trt.export.sources.configs import PUBLISHED
from sdxl_trt.mini import merges, vocabulary

# transformers sets 1e30 for a tokenizer that states no length.
_STATED = 1 << 20
# The files of a tokenizer that transformers reads.
_FILES = (
    "added_tokens.json", "merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    "vocab.json",
)  # fmt: skip


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer's JSON (without padding and truncation, which the runtime does), and its start, end and padding ids.

    `max_length` is the number of ids that it makes per prompt.
    """

    json: bytes
    max_length: int
    bos_id: int
    eos_id: int
    pad_id: int


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """Return {name: content} of the files of the tokenizer in `folder`.

    The package holds CLIP's vocabulary once, not in each published tokenizer: it is added here.
    """
    try:
        files = {name: (folder / name).read_bytes() for name in _FILES if (folder / name).is_file()}
    except OSError as exc:
        raise explain_os_error(exc, f"reading {folder}") from exc
    if _lacks_vocabulary(folder):
        rules = ["#version: 0.2", *merges(), ""]
        files["vocab.json"] = json.dumps(vocabulary(), ensure_ascii=False).encode()
        files["merges.txt"] = "\n".join(rules).encode()
    return files


def load_tokenizer(folder: Path, positions: int = TOKENS) -> LoadedTokenizer:
    """Load a CLIP tokenizer as transformers does, from ``tokenizer.json`` or from vocabulary and merges.

    diffusers cuts and pads a prompt to the tokenizer's ``model_max_length``; without one, the `positions` of its
    encoder count. Raises SourceError for a folder without a CLIP tokenizer, and for a tokenizer whose prompts are
    shorter than SDXL's.
    """
    import transformers  # noqa: PLC0415 - takes seconds to import, needed only to read a tokenizer

    with _complete(folder) as complete:
        if not any((complete / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise SourceError(f"{folder}: has neither tokenizer.json nor vocab.json; download the whole model folder")
        try:
            loaded = transformers.CLIPTokenizerFast.from_pretrained(complete, local_files_only=True)
            content = json.loads(loaded.backend_tokenizer.to_str())
        except Exception as exc:  # tokenizers raises bare Exception
            raise SourceError(f"{folder}: not a CLIP tokenizer ({exc}); download it again") from exc
    content["truncation"] = content["padding"] = None
    framing = (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id)
    length = int(loaded.model_max_length) if loaded.model_max_length < _STATED else positions
    if length < TOKENS or None in framing:
        raise SourceError(
            f"{folder}: SDXL's prompts have {TOKENS} ids or more, with start, end and padding; this tokenizer has"
            f" model_max_length {length} and the ids {framing}"
        )
    compact = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    return LoadedTokenizer(compact, length, *framing)


def _lacks_vocabulary(folder: Path) -> bool:
    return PUBLISHED in folder.parents and not (folder / "vocab.json").is_file()


@contextlib.contextmanager
def _complete(folder: Path) -> Iterator[Path]:
    """Yield `folder`, or a temporary copy of it: to add the vocabulary, or if its path is not UTF-8."""
    if not _lacks_vocabulary(folder) and is_utf8(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="sdxl-trt-tokenizer-") as temporary:
        for name, content in tokenizer_files(folder).items():
            (Path(temporary) / name).write_bytes(content)
        yield Path(temporary)
