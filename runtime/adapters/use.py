"""A LoRA as a request names it: the option --lora, and what a library's caller writes."""

__all__ = ["LoraUse", "parse_use"]

from typing import NamedTuple

from sdxl_trt.engines.adapters import split_lora

_EXPECTED = "give FILE, FILE:SCALE or FILE:SCALE:TE_SCALE, such as a.safetensors:0.8"


class LoraUse(NamedTuple):
    """A LoRA of a request: the path of a file, or its name in the request's `lora_dir`, and its scales.

    `scale` is that on the UNet, `text_scale` that on the text encoders; None there means the UNet's. Scales are finite
    and may be negative.
    """

    path: str
    scale: float = 1.0
    text_scale: float | None = None


def parse_use(text: str) -> LoraUse:
    """Return what ``FILE[:SCALE[:TE_SCALE]]`` states. Raises UsageError."""
    path, scales = split_lora(text, repr(text), _EXPECTED)
    return LoraUse(path, *scales)
