"""The locations of the embedded pair's exported bundle and of its LoRA, and a note for its users."""

__all__ = ["NOTE", "bundle_path", "lora_path"]

from pathlib import Path

NOTE = (
    "this is the embedded pair, a miniature of SDXL trained on drawn shapes: it knows shapes, colours and"
    " backgrounds, and nothing else"
)


def bundle_path() -> Path:
    """Return the folder of the embedded bundle, which is package data and the default of ``trt-generate``."""
    return Path(__file__).with_name("bundle")


def lora_path() -> Path:
    """Return the .safetensors file of the embedded pair's LoRA, package data: every shape gets a white border."""
    return Path(__file__).parent / "loras" / "sticker.safetensors"
