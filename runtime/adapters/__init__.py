"""What a request says about adapters: the embeddings that its prompts name."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.runtime.adapters.embedding_file import ENCODERS, Embedding, EncoderName, read_embedding
    from sdxl_trt.runtime.adapters.embeddings import NO_EMBEDDINGS, EmbeddingFact, Embeddings
    from sdxl_trt.runtime.adapters.folder import find_named
else:
    __getattr__ = lazy_names(__name__, {
        "embedding_file": ("ENCODERS", "Embedding", "EncoderName", "read_embedding"),
        "embeddings": ("NO_EMBEDDINGS", "EmbeddingFact", "Embeddings"),
        "folder": ("find_named",),
    })

__all__ = [
    "ENCODERS", "NO_EMBEDDINGS", "Embedding", "EmbeddingFact", "Embeddings", "EncoderName", "find_named",
    "read_embedding",
]
