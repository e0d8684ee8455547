"""Encode prompts to the embeddings that condition a UNet."""

__all__ = ["PromptEmbeds", "PromptEncoder"]

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines import Engine, UsageError, numpy_dtype
from sdxl_trt.engines.adapters import Use, adapted, name_of
from sdxl_trt.engines.bundle import Manifest, Stage, TextEncoder, Tokenizer
from sdxl_trt.engines.plans import MAX_ROWS_OF_PROMPTS, MAX_VECTORS
from sdxl_trt.engines.residency import EnginePool
from sdxl_trt.runtime.adapters import Embedding, Embeddings, EncoderName
from sdxl_trt.runtime.text.named import read_by
from sdxl_trt.runtime.text.placeholders import has_words, row_of, split_placeholders
from sdxl_trt.runtime.text.prompt import Prompt
from sdxl_trt.runtime.text.tokenizer import PromptTokenizer
from sdxl_trt.runtime.text.vectors import Placed, Vector, encoder_inputs
from sdxl_trt.runtime.text.weighting import Chunk, chunked, empty_chunk, parse_weights, weigh, with_embeddings

log = logging.getLogger("sdxl_trt.runtime")
# The penultimate layer, before the final normalization: SDXL's UNets were trained on it.
PENULTIMATE = -2
CUT_SHOWN = 200
_UNKNOWN_END = 2
"""The eos_token_id in the configs of SDXL's encoders, for which transformers pools at a row's largest id."""
MAX_WEIGHT = 10_000.0
"""ComfyUI has no limit, but a prompt exceeds the range of fp16 far below this one."""
MAX_CHUNKS = 16
"""ComfyUI has no limit, but attention over a prompt of book length takes all memory."""


@dataclass(frozen=True)
class PromptEmbeds:
    """`hidden` (tokens, width of all encoders) and `pooled` (width of the pooled encoder), float32."""

    hidden: NDArray[np.float32]
    pooled: NDArray[np.float32]

    def zeroed(self) -> "PromptEmbeds":
        """Return zeros of the same shape: SDXL's embeddings for no negative prompt."""
        return PromptEmbeds(np.zeros_like(self.hidden), np.zeros_like(self.pooled))

    def followed_by(self, other: "PromptEmbeds") -> "PromptEmbeds":
        """Return these tokens followed by those of `other`, with this pooled vector: ComfyUI's ConditioningConcat."""
        return PromptEmbeds(np.concatenate([self.hidden, other.hidden]), self.pooled)

    def averaged(self, other: "PromptEmbeds", strength: float) -> "PromptEmbeds":
        """Return strength · this + (1 - strength) · `other`, tokens and pooled vector: ComfyUI's ConditioningAverage.

        The result is as long as this one; `other` is cut, or padded with zeros.
        """
        rest = np.zeros_like(self.hidden)
        shared = min(len(rest), len(other.hidden))
        rest[:shared] = other.hidden[:shared]
        own, others = np.float32(strength), np.float32(1.0 - strength)
        return PromptEmbeds(self.hidden * own + rest * others, self.pooled * own + other.pooled * others)


@dataclass(frozen=True)
class _Row:
    """One input row of an encoder; equal rows run once, whichever prompts they belong to."""

    component: Use
    ids: tuple[int, ...]
    clip_skip: int
    vectors: Placed = ()


@dataclass(frozen=True)
class _Text:
    """One text for one encoder: its `chunks`, and the `empty` prompt that weights are relative to."""

    component: Use
    clip_skip: int
    chunks: tuple[Chunk, ...]
    empty: Chunk

    def padded(self, count: int) -> "_Text":
        """Return the text with empty chunks appended up to `count` chunks."""
        return replace(self, chunks=self.chunks + (self.empty,) * (count - len(self.chunks)))

    @property
    def rows(self) -> Iterator[_Row]:
        """Yield the rows needed to encode the text."""
        yield from (self._row(chunk) for chunk in self.chunks)
        if any((chunk.weights != 1.0).any() for chunk in self.chunks):
            yield self._row(self.empty)

    def joined(self, done: Mapping[_Row, PromptEmbeds]) -> PromptEmbeds:
        """Return the weighted chunks joined in order, with the first one's pooled vector."""
        read = [done[self._row(chunk)] for chunk in self.chunks]
        # Without weights the empty prompt is not run, and its value is not used.
        empty = done.get(self._row(self.empty), read[0]).hidden
        parts = [weigh(each.hidden, empty, chunk.weights) for each, chunk in zip(read, self.chunks, strict=True)]
        return PromptEmbeds(np.concatenate(parts), read[0].pooled)

    @property
    def heaviest(self) -> float:
        """Return the weight with the largest absolute value."""
        return max((float(weight) for chunk in self.chunks for weight in chunk.weights), key=abs)

    def _row(self, chunk: Chunk) -> _Row:
        return _Row(self.component, tuple(chunk.ids.tolist()), self.clip_skip, chunk.vectors)


@dataclass(frozen=True)
class _Source:
    """What a text for an encoder is made of: equal ones are tokenized once. `name` is ComfyUI's name of the encoder."""

    encoder: TextEncoder
    use: Use
    name: EncoderName
    text: str
    clip_skip: int
    embeddings: Embeddings


class PromptEncoder:
    """Encodes prompts for the stages of a bundle; an encoder is loaded once for all its prompts with equal LoRAs."""

    def __init__(self, pool: EnginePool) -> None:
        self._pool = pool
        self._tokenizers: dict[str, PromptTokenizer] = {}

    def encode(
        self, wanted: Sequence[tuple[Stage, Prompt]], next_engine: Use, *, weighted: bool = False
    ) -> list[PromptEmbeds]:
        """Return the embeds of each (stage, prompt): concatenated hidden states, and the pooled encoder's vector.

        A stage with a single encoder reads a prompt's `text`, as diffusers' refiner does. A prompt is cut at 77
        tokens. `weighted` follows ComfyUI: weights in parentheses, and as many chunks of 77 tokens as needed, all
        tokenized for the base's first encoder. Long-CLIP encoders have 248 instead of 77. `next_engine` is the engine
        needed next, which the pool may prefetch. Raises UsageError for more than MAX_CHUNKS, a weight beyond
        MAX_WEIGHT or the range of the UNet's dtype, and encoders that ComfyUI uses differently.
        """
        texts = self._read(wanted, weighted=weighted)
        done = self._run_all(dict.fromkeys(row for parts in texts for text in parts for row in text.rows), next_engine)
        joined = [
            _join(stage.text_encoders, [text.joined(done) for text in parts])
            for (stage, _), parts in zip(wanted, texts, strict=True)
        ]
        for (stage, _), parts, embeds in zip(wanted, texts, joined, strict=True):
            self._check_range(stage, parts, embeds)
        return joined

    def check(self, wanted: Sequence[tuple[Stage, Prompt]], *, weighted: bool = False) -> None:
        """Tokenize prompts as `encode` does, with its warnings and its errors but that of the range; load nothing.

        Another thread may call it while this encoder works.
        """
        self._read(wanted, weighted=weighted)

    def _read(self, wanted: Sequence[tuple[Stage, Prompt]], *, weighted: bool) -> list[list[_Text]]:
        """Return the texts of each (stage, prompt); warn of what is cut off or left out."""
        for stage in {id(stage): stage for stage, _ in wanted if weighted}.values():
            _check_as_comfyui(stage, self._pool.bundle.manifest)
        _warn_of_embeddings(wanted, weighted=weighted)
        known: dict[_Source, _Text] = {}
        return [self._texts(stage, prompt, known, weighted=weighted) for stage, prompt in wanted]

    def _texts(self, stage: Stage, prompt: Prompt, known: dict[_Source, _Text], *, weighted: bool) -> list[_Text]:
        """Return a prompt's texts for the encoders of a stage, padded to equally many chunks; `known` caches texts."""
        texts = []
        for encoder, name, text in read_by(stage, prompt):
            use = adapted(encoder.component, prompt.loras or ())
            source = _Source(encoder, use, name, text, prompt.clip_skip, prompt.embeddings)
            if source not in known:
                known[source] = self._text(source, weighted=weighted)
            texts.append(known[source])
        return [text.padded(max(len(each.chunks) for each in texts)) for text in texts]

    def _text(self, source: _Source, *, weighted: bool) -> _Text:
        component, spec = source.encoder.component, self._tokenizer(source.encoder.tokenizer).spec
        empty = empty_chunk(spec)
        if weighted:
            chunks = self._weighted_chunks(source, spec)
        elif any(piece.embedding for piece in split_placeholders(source.text, source.embeddings)):
            chunks = [self._row_with_embeddings(source)]
        else:
            tokenizer = self._tokenizer(source.encoder.tokenizer)
            _warn_of_cut(component, source.text, tokenizer)
            chunks = [Chunk(tokenizer.ids(source.text), empty.weights)]
        return _Text(source.use, source.clip_skip, tuple(chunks), empty)

    def _weighted_chunks(self, source: _Source, frame: Tokenizer) -> list[Chunk]:
        """Return the chunks of a text in ComfyUI's syntax. Raises UsageError for extreme weights and lengths."""
        # The second encoder's own tokenizer treats every "!" as padding.
        words = self._tokenizer(self._pool.bundle.manifest.base.text_encoders[0].tokenizer)
        segments, _ = with_embeddings(parse_weights(source.text), source.embeddings)
        for weight in (segment.weight for segment in segments):
            if not abs(weight) <= MAX_WEIGHT:  # also refuses nan
                raise UsageError(f"a weight of {weight:g} in the prompt; choose {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}")
        chunks = chunked(segments, frame, words.pieces, lambda embedding: self._vectors(embedding, source))
        if len(chunks) > MAX_CHUNKS:
            raise UsageError(f"a prompt takes {len(chunks)} chunks of {frame.max_length} tokens; shorten it to"
                             f" {MAX_CHUNKS}")  # fmt: skip
        return chunks

    def _row_with_embeddings(self, source: _Source) -> Chunk:
        """Return the row of a text whose placeholders are replaced as in diffusers; warn of what is cut off."""
        component, tokenizer = source.encoder.component, self._tokenizer(source.encoder.tokenizer)
        config = self._pool.bundle.manifest.components[component].config
        row, cut = row_of(
            split_placeholders(source.text, source.embeddings), lambda embedding: self._vectors(embedding, source),
            tokenizer.spec, tokenizer.pieces, at_largest=config.get("eos_token_id") == _UNKNOWN_END,
        )  # fmt: skip
        if cut:
            log.warning("%s: a prompt is longer than %d tokens; its last %d are cut off: %s", component,
                        tokenizer.spec.max_length, cut, source.text[-CUT_SHOWN:])  # fmt: skip
        return row

    def _vectors(self, embedding: Embedding, source: _Source) -> list[Vector | None]:
        """Return an embedding's vectors for the encoder of `source`, or as many None if the file has none for it."""
        spec = self._pool.bundle.manifest.components[source.encoder.component].input("embeddings")
        fits = embedding.vectors(source.name, int(spec.shape[-1])) is not None
        return [
            Vector(embedding, source.name, row) if fits else None for row in range(len(embedding.found_by(source.name)))
        ]

    def _tokenizer(self, name: str) -> PromptTokenizer:
        if name not in self._tokenizers:
            self._tokenizers[name] = PromptTokenizer(self._pool.bundle, name)
        return self._tokenizers[name]

    def _check_range(self, stage: Stage, texts: Sequence[_Text], embeds: PromptEmbeds) -> None:
        """Raise UsageError for weights that take a prompt beyond the range of the stage's UNet input."""
        heaviest = max((text.heaviest for text in texts), key=abs)
        dtype = np.dtype(numpy_dtype(self._pool.bundle.manifest.components[stage.unet].input("encoder_hidden_states")))
        if heaviest != 1.0 and not np.abs(embeds.hidden).max() <= np.finfo(dtype).max:
            raise UsageError(f"a weight of {heaviest:g} takes the prompt beyond the range of the {dtype.name} UNet;"
                             " choose one nearer to 1")  # fmt: skip

    def _run_all(self, rows: Iterable[_Row], next_engine: Use) -> dict[_Row, PromptEmbeds]:
        by_use: dict[Use, list[_Row]] = {}
        for row in rows:
            by_use.setdefault(row.component, []).append(row)
        done: dict[_Row, PromptEmbeds] = {}
        order = self._order(list(by_use))
        for use, after in zip(order, [*order[1:], next_engine], strict=True):
            (engine,) = self._pool.phase(use, next_engines=(after,))
            for together in _calls(by_use[use]):
                done |= _run(engine, together)
        return done

    def _order(self, uses: Sequence[Use]) -> list[Use]:
        """Return `uses` with those of one encoder in a row, the one that is loaded first: the others reload it."""
        names = list(dict.fromkeys(map(name_of, uses)))
        return sorted(uses, key=lambda use: (names.index(name_of(use)), not self._pool.holds(use)))


def _check_as_comfyui(stage: Stage, manifest: Manifest) -> None:
    """Raise UsageError for encoders that ComfyUI uses differently.

    Its chunks are as long as an encoder has positions (comfy/text_encoders/long_clipl.py), whatever the tokenizer
    states, and its pooled prompt comes from the second encoder.
    """
    for encoder in stage.text_encoders:
        length = manifest.tokenizers[encoder.tokenizer].max_length
        positions = manifest.components[encoder.component].config.get("max_position_embeddings", length)
        if positions != length:
            raise UsageError(f"--compat comfyui: {encoder.component} reads {length} tokens here, but {positions} in"
                             " ComfyUI; use --compat diffusers, or export it with a tokenizer whose model_max_length is"
                             f" {positions}")  # fmt: skip
    if not stage.text_encoders[-1].pooled:
        raise UsageError("--compat comfyui: this bundle takes the pooled prompt from its first encoder, as diffusers"
                         " does, but ComfyUI takes it from the second; use --compat diffusers")  # fmt: skip


def _calls(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    """Yield the rows that share a call, at most MAX_ROWS_OF_PROMPTS with MAX_VECTORS different vectors."""
    together: list[_Row] = []
    vectors: set[Vector] = set()
    for row in rows:
        more = vectors | {vector for _, vector in row.vectors}
        if len(together) == MAX_ROWS_OF_PROMPTS or len(more) > MAX_VECTORS:
            yield together
            together, more = [], {vector for _, vector in row.vectors}
        together, vectors = [*together, row], more
    if together:
        yield together


def _warn_of_embeddings(wanted: Sequence[tuple[Stage, Prompt]], *, weighted: bool) -> None:
    """Warn once of each embedding that the prompts name and that is not used."""
    read = dict.fromkeys((text, prompt.embeddings) for stage, prompt in wanted for *_, text in read_by(stage, prompt))
    if weighted:
        missing = (name for text, own in read for name in with_embeddings(parse_weights(text), own)[1])
        for name in dict.fromkeys(missing):
            log.warning("embedding:%s is left out: --embedding-dir names no folder that has it", name[:CUT_SHOWN])
    elif any(has_words(text) and own.folder is None for text, own in read):
        log.warning("embedding: in a prompt is read as text; give --embedding-dir, the folder of embeddings")


def _warn_of_cut(component: str, text: str, tokenizer: PromptTokenizer) -> None:
    if cut := tokenizer.cut_off(text):
        length = tokenizer.spec.max_length
        log.warning("%s: a prompt is longer than %d tokens; this is cut off: %s", component, length, cut[:CUT_SHOWN])


def _run(engine: Engine, rows: Sequence[_Row]) -> dict[_Row, PromptEmbeds]:
    outputs = [spec.name for spec in engine.component.outputs]
    states = [name for name in outputs if name.startswith("hidden_states.")]
    state_of = {row: states[PENULTIMATE - row.clip_skip] for row in rows}
    pooled = [name for name in outputs if name == "text_embeds"]
    ids = np.array([row.ids for row in rows], dtype=np.int64)
    inputs = encoder_inputs(engine.component, ids, [row.vectors for row in rows])
    result = engine.infer(inputs, [*dict.fromkeys(state_of.values()), *pooled])
    vectors = result["text_embeds"].astype(np.float32) if pooled else np.zeros((len(ids), 0), np.float32)
    return {
        row: PromptEmbeds(result[state][index].astype(np.float32), vectors[index])
        for index, (row, state) in enumerate(state_of.items())
    }


def _join(encoders: Sequence[TextEncoder], parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
    pooled = next(part.pooled for encoder, part in zip(encoders, parts, strict=True) if encoder.pooled)
    return PromptEmbeds(np.concatenate([part.hidden for part in parts], axis=-1), pooled)
