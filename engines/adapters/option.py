"""A LoRA as options name it: a file, its scale on the UNet, and its scale on the text encoders."""

__all__ = ["REFINER_NOTE", "LoraOption", "parse_lora_option", "split_lora"]

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
_EXPECTED = "give FILE.safetensors, FILE.safetensors:UNET or FILE.safetensors:UNET:TE, such as a.safetensors:0.8"
# A path may contain colons, so it extends to the last .safetensors; a bare name ends at the first colon.
_OPTION = re.compile(r"(.*\.safetensors|[^:]+)((?::[^:]*){0,2})", re.IGNORECASE | re.DOTALL)


class LoraOption(NamedTuple):
    """A LoRA file with its scale on the UNet, and on the text encoders; None there means the UNet's."""

    file: Path
    scale: float = 1.0
    text_scale: float | None = None


def parse_lora_option(text: str) -> LoraOption:
    """Parse ``FILE.safetensors[:UNET[:TE]]``; scales may be negative, the UNet's is 1 by default.

    Raises UsageError.
    """
    where = f"--lora {text}"
    path, scales = split_lora(text, where, _EXPECTED)
    if not path.lower().endswith(".safetensors"):
        raise UsageError(f"{where}: {_EXPECTED}")
    return LoraOption(Path(path), *scales)


def split_lora(text: str, where: str, expected: str) -> tuple[str, list[float]]:
    """Return the file or the bare name in ``FILE[:UNET[:TE]]``, and the scales, two at most, each finite.

    Raises UsageError, which begins with `where` and ends with what was `expected`.
    """
    found = _OPTION.fullmatch(text)
    if found is None:
        raise UsageError(f"{where}: {expected}")
    scales = []
    for part in found[2].split(":")[1:]:
        scale = finite_number(part)
        if scale is None:
            raise UsageError(f"{where}: {part!r} is not a scale; {expected}")
        scales.append(scale)
    return found[1], scales
