"""A LoRA as a request names it: the option --lora, and what a library's caller writes."""

__all__ = ["LoraUse", "parse_use"]

import re
from typing import NamedTuple

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.host import finite_number

_EXPECTED = "give FILE, FILE:SCALE or FILE:SCALE:TE_SCALE, such as a.safetensors:0.8"
# A path may contain colons, so it extends to the last .safetensors; a bare name ends at the first colon.
_OPTION = re.compile(r"(.*\.safetensors|[^:]+)((?::[^:]*){0,2})", re.IGNORECASE | re.DOTALL)


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
    found = _OPTION.fullmatch(text)
    if found is None:
        raise UsageError(f"{text!r}: {_EXPECTED}")
    scales = [_scale(text, part) for part in found[2].split(":")[1:]]
    return LoraUse(found[1], *scales)


def _scale(text: str, part: str) -> float:
    scale = finite_number(part)
    if scale is None:
        raise UsageError(f"{text!r}: {part!r} is not a scale; {_EXPECTED}")
    return scale
