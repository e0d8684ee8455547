"""Text encoders in training: compact token tables during training, the full CLIP vocabulary afterwards.

Captions use a few dozen of CLIP's 49,408 tokens. Training a row for each of the others would dominate the cost of
every optimizer step without teaching them anything, so the encoders train with one row for each token in captions and
ONE row for all others, trained on random filler words.
"""

__all__ = ["Encoders", "Ids", "compact", "tokenize", "with_fillers"]

import json
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdxl_trt.mini import architecture
from sdxl_trt.mini import clip_vocabulary as vocabulary

Ids = npt.NDArray[np.int64]
UNKNOWN = 0
"""Compact id of all tokens that captions never use: the smallest, so that the end token's stays the largest."""
FILLER_CHANCE = 0.12


def tokenizers() -> list[CLIPTokenizer]:
    """Tokenizer 1 (pads with the end token) and tokenizer 2 (pads with "!")."""
    made = []
    for pad in (vocabulary.END, "!"):
        with tempfile.TemporaryDirectory() as folder:
            vocabulary_file, merges_file = Path(folder, "vocab.json"), Path(folder, "merges.txt")
            vocabulary_file.write_text(json.dumps(vocabulary.vocabulary()))
            merges_file.write_text("#version: 0.2\n" + "\n".join(vocabulary.merges()))
            made.append(CLIPTokenizer(str(vocabulary_file), str(merges_file), pad_token=pad, model_max_length=77))
    return made


def tokenize(captions: list[str]) -> Ids:
    """CLIP ids `(len(captions), 2, 77)`: for tokenizer 1, then for tokenizer 2."""
    sides = [
        tokenizer(captions, padding="max_length", max_length=architecture.TOKENS, truncation=True)["input_ids"]
        for tokenizer in tokenizers()
    ]
    return np.stack([np.asarray(side, np.int64) for side in sides], axis=1)


def compact(ids: Ids, used: Ids) -> Ids:
    """CLIP ids as rows of the compact table: `used` is sorted, ids not in it become `UNKNOWN`."""
    at = np.searchsorted(used, ids).clip(max=len(used) - 1)
    return np.where(used[at] == ids, at + 1, UNKNOWN)


def with_fillers(ids: Ids, rng: np.random.Generator) -> Ids:
    """Compact ids `(n, 2, 77)` with up to three unknown words in some captions, at the same place for both encoders."""
    ids = ids.copy()
    for row in np.flatnonzero(rng.random(len(ids)) < FILLER_CHANCE):
        count = rng.integers(1, 4)
        length = int(ids[row, 0].argmax())
        at = rng.integers(1, length + 1)
        ids[row, :, at + count :] = ids[row, :, at:-count].copy()
        ids[row, :, at : at + count] = UNKNOWN
    return ids


class Encoders(nn.Module):  # type: ignore[misc]
    """Both text encoders; compact ids `(n, 2, 77)` to states `(n, 77, 112)` and the pooled vector `(n, 64)`."""

    def __init__(self, rows: int) -> None:
        """Create untrained encoders with token tables of `rows` rows."""
        super().__init__()
        self.first = CLIPTextModel(_config(architecture.text_encoder(rows)))
        self.second = CLIPTextModelWithProjection(_config(architecture.text_encoder_2(rows)))

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States of the second last layers, concatenated, and the projection of encoder 2: SDXL's conditioning."""
        first = self.first(ids[:, 0], output_hidden_states=True)
        second = self.second(ids[:, 1], output_hidden_states=True)
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return states, second.text_embeds


def _config(parts: architecture.Config) -> CLIPTextConfig:
    return CLIPTextConfig(
        **{name: value for name, value in parts.items() if name not in ("architectures", "torch_dtype")}
    )
