"""The embeddings that a request's prompts name: found and checked before anything is loaded, and recorded."""

__all__ = ["check_sides", "embedding_facts", "open_embeddings"]

from collections.abc import Mapping
from pathlib import Path

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.bundle import Manifest
from sdxl_trt.runtime.adapters import NO_EMBEDDINGS, EmbeddingFact, Embeddings
from sdxl_trt.runtime.request.side import StageName
from sdxl_trt.runtime.request.sides import ResolvedSide
from sdxl_trt.runtime.text import check_embeddings


def open_embeddings(folder: Path | None) -> Embeddings:
    """Return the embeddings in a request's folder, and without one the same none for every request.

    So equal prompts of several requests are equal, and encoded once. Raises UsageError if it is no folder.
    """
    if folder is not None and not folder.is_dir():
        raise UsageError(f"--embedding-dir {folder}: no such folder; give the one that holds the embeddings")
    return NO_EMBEDDINGS if folder is None else Embeddings(folder)


def check_sides(
    sides: Mapping[StageName, tuple[ResolvedSide, ResolvedSide]], manifest: Manifest, *, comfyui: bool
) -> None:
    """Find the embeddings that the prompts of all `sides` name, and check that the bundle's encoders take them.

    Raises UsageError, SourceError, CorruptError, and IncompatibleError for a bundle of an older version.
    """
    stages = manifest.stages()
    for name, both in sides.items():
        for prompt in dict.fromkeys(prompt for side in both for prompt in side.prompts()):
            check_embeddings(stages[name], prompt, manifest, weighted=comfyui)


def embedding_facts(embeddings: Embeddings) -> tuple[EmbeddingFact, ...]:
    """Return what a record says of the embeddings that were found."""
    return tuple(EmbeddingFact(name=each.name, sha256=each.sha256) for each in embeddings.used)
