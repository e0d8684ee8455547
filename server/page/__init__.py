"""The web page: its files, and what it may offer, which only the server knows."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.server.page.routes import router
else:
    __getattr__ = lazy_names(__name__, {"routes": ("router",)})

__all__ = ["router"]
