"""The embeddings that a request's prompts name: found and checked before anything is loaded, and recorded."""

__all__ = ["check_sides", "embedding_facts"]

from collections.abc import Mapping

from sdxl_trt.engines.bundle import Manifest
from sdxl_trt.runtime.adapters import EmbeddingFact, Embeddings
from sdxl_trt.runtime.request.sides import ResolvedSide, StageName
from sdxl_trt.runtime.text import check_embeddings


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
