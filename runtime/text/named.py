"""The embeddings that prompts name, compared with a bundle's text encoders before anything is loaded."""

__all__ = ["check_embeddings", "read_by"]

from collections.abc import Iterator, Mapping

import numpy as np

from sdxl_trt.engines import IncompatibleError, SourceError, numpy_dtype
from sdxl_trt.engines.bundle import Component, Manifest, Stage, TextEncoder
from sdxl_trt.runtime.adapters import ENCODERS, Embedding, EncoderName
from sdxl_trt.runtime.text.placeholders import split_placeholders
from sdxl_trt.runtime.text.prompt import Prompt
from sdxl_trt.runtime.text.weighting import parse_weights, with_embeddings


def read_by(stage: Stage, prompt: Prompt) -> Iterator[tuple[TextEncoder, EncoderName, str]]:
    """Yield a stage's encoders, their names in ComfyUI, and the text that each reads: a single one is SDXL's second."""
    encoders = stage.text_encoders
    yield from zip(encoders, ENCODERS[-len(encoders) :], (prompt.text, prompt.text_2), strict=False)


def check_embeddings(stage: Stage, prompt: Prompt, manifest: Manifest, *, weighted: bool) -> None:
    """Find the embeddings that `prompt` names, and check that the encoders of `stage` take them.

    Raises SourceError for one of another model, IncompatibleError for a bundle of an older version, and what finding
    raises.
    """
    for encoder, name, text in read_by(stage, prompt):
        for embedding in _named(text, prompt, weighted=weighted):
            component = manifest.components[encoder.component]
            if not component.takes_embeddings:
                raise IncompatibleError(f"{embedding.name}: {encoder.component} of this bundle takes no embeddings,"
                                        " since an older version exported it; export it again: export-engines --base"
                                        " SRC --refiner SRC --out BUNDLE")  # fmt: skip
            _check_widths(embedding, _widths(manifest))
            _check_range(embedding, name, component)


def _named(text: str, prompt: Prompt, *, weighted: bool) -> Iterator[Embedding]:
    if weighted:
        parts, _ = with_embeddings(parse_weights(text), prompt.embeddings)
        yield from (part.embedding for part in parts if part.embedding)
    else:
        yield from (piece.embedding for piece in split_placeholders(text, prompt.embeddings) if piece.embedding)


def _widths(manifest: Manifest) -> Mapping[str, int]:
    """Return the widths of SDXL's encoders, in base and refiner."""
    found: dict[str, int] = {}
    for stage in manifest.stages().values():
        for name, encoder in zip(ENCODERS[-len(stage.text_encoders) :], stage.text_encoders, strict=True):
            component = manifest.components[encoder.component]
            if component.takes_embeddings:
                found.setdefault(name, _width(component))
    return found


def _width(component: Component) -> int:
    return int(component.input("embeddings").shape[-1])


def _check_widths(embedding: Embedding, widths: Mapping[str, int]) -> None:
    for encoder, vectors in embedding.tensors.items():
        fitting = [widths[encoder]] if encoder in widths else [*widths.values()]
        if vectors.shape[1] not in fitting:
            takes = " and ".join(f"{width} for {name}" for name, width in widths.items())
            raise SourceError(f"{embedding.name}: is for another model: its vectors have width {vectors.shape[1]}"
                              f"{f' for {encoder}' if encoder else ''}, but this bundle's encoders take {takes}; use an"
                              " embedding that was trained on SDXL")  # fmt: skip


def _check_range(embedding: Embedding, name: EncoderName, component: Component) -> None:
    vectors = embedding.vectors(name, _width(component))
    dtype = np.dtype(numpy_dtype(component.input("embeddings")))
    if vectors is not None and np.abs(vectors).max() > np.finfo(dtype).max:
        raise SourceError(f"{embedding.name}: its vectors are beyond the range of the {dtype.name} encoders; use"
                          " another embedding, or export the bundle with --fp32")  # fmt: skip
