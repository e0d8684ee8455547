"""Prompts to the embeddings that condition a UNet."""

__all__ = ["Prompt", "PromptEmbeds", "PromptEncoder"]

import logging
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines.bundle import Stage, TextEncoder
from sdxl_trt.engines.pool import EnginePool
from sdxl_trt.runtime.tokenizer import PromptTokenizer

log = logging.getLogger("sdxl_trt.runtime")
# The last layer but one, before the final normalization: what SDXL's UNets were trained on.
PENULTIMATE = -2


@dataclass(frozen=True)
class Prompt:
    """A prompt and what the second encoder reads in its place; None as `text` is an absent negative."""

    text: str
    text_2: str


@dataclass(frozen=True)
class PromptEmbeds:
    """`hidden` (tokens, width of all encoders) and `pooled` (width of the pooled encoder), float32."""

    hidden: NDArray[np.float32]
    pooled: NDArray[np.float32]

    def zeroed(self) -> "PromptEmbeds":
        """Return zeros of the same shape: SDXL's absent negative prompt."""
        return PromptEmbeds(np.zeros_like(self.hidden), np.zeros_like(self.pooled))


class PromptEncoder:
    """Encodes prompts for the stages of a bundle; a text that stages share is encoded once."""

    def __init__(self, pool: EnginePool) -> None:
        self._pool = pool
        self._tokenizers: dict[str, PromptTokenizer] = {}
        self._encoded: dict[tuple[str, str, str], PromptEmbeds] = {}

    def encode(self, stage: Stage, prompt: Prompt) -> PromptEmbeds:
        """Return the embeds of `prompt` for `stage`: hidden states side by side, pooled from the pooled encoder.

        A stage with a single encoder reads `text`, as diffusers' refiner does.
        """
        texts = (prompt.text, prompt.text_2)[: len(stage.text_encoders)]
        parts = [self._encode(encoder, text) for encoder, text in zip(stage.text_encoders, texts, strict=True)]
        hidden = np.concatenate([part.hidden for part in parts], axis=-1)
        pooled = next(part.pooled for part, e in zip(parts, stage.text_encoders, strict=True) if e.pooled)
        return PromptEmbeds(hidden, pooled)

    def forget(self) -> None:
        """Drop what was encoded; tokenizers stay."""
        self._encoded.clear()

    def _encode(self, encoder: TextEncoder, text: str) -> PromptEmbeds:
        key = (encoder.component, encoder.tokenizer, text)
        if key not in self._encoded:
            self._encoded[key] = self._run(encoder, text)
        return self._encoded[key]

    def _run(self, encoder: TextEncoder, text: str) -> PromptEmbeds:
        tokenizer = self._tokenizer(encoder.tokenizer)
        if cut := tokenizer.cut_off(text):
            log.warning("the prompt is longer than %d tokens; this is not read: %s", tokenizer.spec.max_length, cut)
        (engine,) = self._pool.phase(encoder.component)
        states = [spec.name for spec in engine.component.outputs if spec.name.startswith("hidden_states.")]
        wanted = [states[PENULTIMATE], *(["text_embeds"] if encoder.pooled else [])]
        result = engine.infer({"input_ids": tokenizer.ids(text)[None]}, wanted)
        pooled = result["text_embeds"][0] if encoder.pooled else np.zeros(0)
        return PromptEmbeds(result[wanted[0]][0].astype(np.float32), pooled.astype(np.float32))

    def _tokenizer(self, name: str) -> PromptTokenizer:
        if name not in self._tokenizers:
            self._tokenizers[name] = PromptTokenizer(self._pool.bundle, name)
        return self._tokenizers[name]
