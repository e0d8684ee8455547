"""What a request says about adapters: LoRAs and embeddings by file, by name and in prompts."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.runtime.adapters.embedding_file import ENCODERS, Embedding, EncoderName
    from sdxl_trt.runtime.adapters.embeddings import NO_EMBEDDINGS, EmbeddingFact, Embeddings
    from sdxl_trt.runtime.adapters.folder import find_named, names_in
    from sdxl_trt.runtime.adapters.loras import (
        MOST_LORAS, LoraFact, SettledLoras, find_lora, find_recorded, lora_digest, settle_loras,
    )
    from sdxl_trt.runtime.adapters.tags import split_tags, tags_of
    from sdxl_trt.runtime.adapters.use import LoraUse, parse_use
else:
    __getattr__ = lazy_names(__name__, {
        "embedding_file": ("ENCODERS", "Embedding", "EncoderName"),
        "embeddings": ("NO_EMBEDDINGS", "EmbeddingFact", "Embeddings"),
        "folder": ("find_named", "names_in"),
        "loras": ("MOST_LORAS", "LoraFact", "SettledLoras", "find_lora", "find_recorded", "lora_digest",
                  "settle_loras"),
        "tags": ("split_tags", "tags_of"),
        "use": ("LoraUse", "parse_use"),
    })

__all__ = [
    "ENCODERS", "MOST_LORAS", "NO_EMBEDDINGS", "Embedding", "EmbeddingFact", "Embeddings", "EncoderName", "LoraFact",
    "LoraUse", "SettledLoras", "find_lora", "find_named", "find_recorded", "lora_digest", "names_in", "parse_use",
    "settle_loras", "split_tags", "tags_of",
]
