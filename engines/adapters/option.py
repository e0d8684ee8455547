"""The option --lora: a file, its scale on the UNet, and its scale on the text encoders."""

__all__ = ["REFINER_NOTE", "LoraOption", "parse_lora_option"]

import re
from pathlib import Path
from typing import NamedTuple

from sdxl_trt.engines.errors import UsageError
from sdxl_trt.engines.host import finite_number

REFINER_NOTE = (
    "the refiner was not trained with this LoRA, so its steps weaken or remove the LoRA's style and subject; generate"
    " with --no-refiner, or hand off later (--handoff 0.9 or more)"
)
"""What commands say where a LoRA changes the base and a refiner follows."""
_EXPECTED = "expected FILE.safetensors, FILE.safetensors:UNET or FILE.safetensors:UNET:TE, such as a.safetensors:0.8"
# File names may contain colons, so the file extends to the last .safetensors.
_OPTION = re.compile(r"(.*\.safetensors)((?::[^:]*){0,2})", re.IGNORECASE | re.DOTALL)


class LoraOption(NamedTuple):
    """A LoRA file with its scale on the UNet, and on the text encoders; None there means the UNet's."""

    file: Path
    scale: float = 1.0
    text_scale: float | None = None


def parse_lora_option(text: str) -> LoraOption:
    """Parse ``FILE.safetensors[:UNET[:TE]]``; scales may be negative, the UNet's is 1 by default.

    Raises UsageError.
    """
    found = _OPTION.fullmatch(text)
    if found is None:
        raise UsageError(f"--lora {text}: {_EXPECTED}")
    scales = [_scale(text, part) for part in found[2].split(":")[1:]]
    return LoraOption(Path(found[1]), *scales)


def _scale(text: str, part: str) -> float:
    scale = finite_number(part)
    if scale is None:
        raise UsageError(f"--lora {text}: {part!r} is not a scale; give a finite number after the colon, such as 0.8")
    return scale
