"""Prompts to embeddings."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.runtime.text.encoder import PENULTIMATE, Prompt, PromptEmbeds, PromptEncoder
    from sdxl_trt.runtime.text.tokenizer import PromptTokenizer
else:
    __getattr__ = lazy_names(__name__, {
        "encoder": ("PENULTIMATE", "Prompt", "PromptEmbeds", "PromptEncoder"),
        "tokenizer": ("PromptTokenizer",),
    })

__all__ = ["PENULTIMATE", "Prompt", "PromptEmbeds", "PromptEncoder", "PromptTokenizer"]
