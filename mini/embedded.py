"""The locations of the embedded pair's exported bundle and of its LoRAs, and a note for its users."""

__all__ = ["LORAS", "NOTE", "bundle_path", "lora_path"]

from pathlib import Path

NOTE = (
    "this is the embedded pair, a miniature of SDXL trained on drawn shapes: it knows shapes, colours and"
    " backgrounds, and nothing else"
)

LORAS = {"base": "sticker", "refiner": "sticker_refiner"}
"""The LoRAs that were trained on the embedded pair, by stage: each gives every shape a white border."""


def bundle_path() -> Path:
    """Return the folder of the embedded bundle, which is package data and the default of ``trt-generate``."""
    return Path(__file__).with_name("bundle")


def lora_path(name: str) -> Path:
    """Return the .safetensors file of one of `LORAS`, which is package data. Raises `KeyError` for another name."""
    if name not in LORAS.values():
        raise KeyError(f"{name!r} is none of the embedded pair's LoRAs: {', '.join(LORAS.values())}")
    return Path(__file__).parent / "loras" / f"{name}.safetensors"
