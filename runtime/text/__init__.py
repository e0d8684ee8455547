"""Prompts to embeddings."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.runtime.text.encoder import PENULTIMATE, PromptEmbeds, PromptEncoder
    from sdxl_trt.runtime.text.named import check_embeddings
    from sdxl_trt.runtime.text.prompt import Prompt
    from sdxl_trt.runtime.text.prompt_files import read_prompts
    from sdxl_trt.runtime.text.tokenizer import PromptTokenizer
    from sdxl_trt.runtime.text.vectors import encoder_inputs
else:
    __getattr__ = lazy_names(__name__, {
        "encoder": ("PENULTIMATE", "PromptEmbeds", "PromptEncoder"),
        "named": ("check_embeddings",),
        "prompt": ("Prompt",),
        "prompt_files": ("read_prompts",),
        "tokenizer": ("PromptTokenizer",),
        "vectors": ("encoder_inputs",),
    })

__all__ = [
    "PENULTIMATE", "Prompt", "PromptEmbeds", "PromptEncoder", "PromptTokenizer", "check_embeddings", "encoder_inputs",
    "read_prompts",
]
