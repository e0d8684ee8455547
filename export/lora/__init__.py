"""Fuse LoRAs into a checkpoint's weights."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.export.lora.fuse import REFINER_NOTE, check_fits, fuse_loras
else:
    __getattr__ = lazy_names(__name__, {"fuse": ("REFINER_NOTE", "check_fits", "fuse_loras")})

__all__ = ["REFINER_NOTE", "check_fits", "fuse_loras"]
