"""AUTOMATIC1111's API: txt2img, img2img, progress, options, and its menus."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.server.a1111.routes import router
else:
    __getattr__ = lazy_names(__name__, {"routes": ("router",)})

__all__ = ["router"]
