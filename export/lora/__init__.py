"""Read LoRA files and fuse them into a checkpoint's weights."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.export.lora.file import open_lora
    from sdxl_trt.export.lora.fuse import REFINER_NOTE, ScaledLora, check_fits, fuse_loras
    from sdxl_trt.export.lora.names import COMPONENTS, LoraComponent
    from sdxl_trt.export.lora.option import LoraOption, parse_lora_option
else:
    __getattr__ = lazy_names(__name__, {
        "file": ("open_lora",),
        "fuse": ("REFINER_NOTE", "ScaledLora", "check_fits", "fuse_loras"),
        "names": ("COMPONENTS", "LoraComponent"),
        "option": ("LoraOption", "parse_lora_option"),
    })

__all__ = [
    "COMPONENTS", "REFINER_NOTE", "LoraComponent", "LoraOption", "ScaledLora", "check_fits", "fuse_loras", "open_lora",
    "parse_lora_option",
]
