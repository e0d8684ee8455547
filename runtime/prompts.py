"""Prompts to the embeddings that condition a UNet."""

__all__ = ["Prompt", "PromptEmbeds", "PromptEncoder"]

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines.base import Engine
from sdxl_trt.engines.manifest import Stage, TextEncoder
from sdxl_trt.engines.pool import EnginePool
from sdxl_trt.engines.profiles import MAX_ROWS_OF_PROMPTS
from sdxl_trt.runtime.tokenizer import PromptTokenizer

log = logging.getLogger("sdxl_trt.runtime")
# The last layer but one, before the final normalization: what SDXL's UNets were trained on.
PENULTIMATE = -2
CUT_SHOWN = 200


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what the second encoder reads."""

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


@dataclass(frozen=True)
class _Reading:
    """One text read by one encoder; equal readings are done once, whichever stages ask for them."""

    component: str
    tokenizer: str
    text: str


class PromptEncoder:
    """Encodes prompts for the stages of a bundle; every encoder is loaded once for all that it has to read."""

    def __init__(self, pool: EnginePool) -> None:
        self._pool = pool
        self._tokenizers: dict[str, PromptTokenizer] = {}

    def encode(self, wanted: Sequence[tuple[Stage, Prompt]], following: str) -> list[PromptEmbeds]:
        """Return the embeds of each (stage, prompt): hidden states side by side, pooled from the pooled encoder.

        A stage with a single encoder reads a prompt's `text`, as diffusers' refiner does. `following` is the engine
        that is needed next, for the pool to make ready.
        """
        readings = [_readings(stage, prompt) for stage, prompt in wanted]
        done = self._read_all((reading for parts in readings for reading in parts), following)
        return [
            _join(stage.text_encoders, [done[reading] for reading in parts])
            for (stage, _), parts in zip(wanted, readings, strict=True)
        ]

    def _read_all(self, readings: Iterable[_Reading], following: str) -> dict[_Reading, PromptEmbeds]:
        by_component: dict[str, dict[_Reading, None]] = {}
        for reading in readings:
            by_component.setdefault(reading.component, {})[reading] = None
        done: dict[_Reading, PromptEmbeds] = {}
        nexts = [*list(by_component)[1:], following]
        for (component, distinct), upcoming in zip(by_component.items(), nexts, strict=True):
            (engine,) = self._pool.phase(component, then=(upcoming,))
            ids = np.stack([self._ids(reading) for reading in distinct])
            parts = (ids[start : start + MAX_ROWS_OF_PROMPTS] for start in range(0, len(ids), MAX_ROWS_OF_PROMPTS))
            embeds = [each for part in parts for each in _run(engine, part)]
            done.update(zip(distinct, embeds, strict=True))
        return done

    def _ids(self, reading: _Reading) -> NDArray[np.int64]:
        if reading.tokenizer not in self._tokenizers:
            self._tokenizers[reading.tokenizer] = PromptTokenizer(self._pool.bundle, reading.tokenizer)
        tokenizer = self._tokenizers[reading.tokenizer]
        if cut := tokenizer.cut_off(reading.text):
            length = tokenizer.spec.max_length
            log.warning(
                "%s: a prompt is longer than %d tokens; this is not read: %s",
                reading.component,
                length,
                cut[:CUT_SHOWN],
            )
        return tokenizer.ids(reading.text)


def _readings(stage: Stage, prompt: Prompt) -> list[_Reading]:
    texts = (prompt.text, prompt.text_2)
    return [
        _Reading(encoder.component, encoder.tokenizer, text)
        for encoder, text in zip(stage.text_encoders, texts, strict=False)
    ]


def _run(engine: Engine, ids: NDArray[np.int64]) -> list[PromptEmbeds]:
    outputs = [spec.name for spec in engine.component.outputs]
    states = [name for name in outputs if name.startswith("hidden_states.")]
    pooled = [name for name in outputs if name == "text_embeds"]
    result = engine.infer({"input_ids": ids}, [states[PENULTIMATE], *pooled])
    hidden = result[states[PENULTIMATE]].astype(np.float32)
    vectors = result["text_embeds"].astype(np.float32) if pooled else np.zeros((len(ids), 0), np.float32)
    return [PromptEmbeds(*each) for each in zip(hidden, vectors, strict=True)]


def _join(encoders: Sequence[TextEncoder], parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
    pooled = next(part.pooled for encoder, part in zip(encoders, parts, strict=True) if encoder.pooled)
    return PromptEmbeds(np.concatenate([part.hidden for part in parts], axis=-1), pooled)
