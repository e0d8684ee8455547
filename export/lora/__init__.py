"""Fuse LoRAs into a checkpoint's weights."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.export.lora.fuse import check_fits, fuse_loras
else:
    __getattr__ = lazy_names(__name__, {"fuse": ("check_fits", "fuse_loras")})

__all__ = ["check_fits", "fuse_loras"]
