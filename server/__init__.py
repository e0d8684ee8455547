"""trt-serve: the pipeline behind HTTP, for the clients that people already have."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.server.app import create_app
    from sdxl_trt.server.options import Options
else:
    __getattr__ = lazy_names(__name__, {
        "app": ("create_app",),
        "options": ("Options",),
    })

__all__ = ["Options", "create_app"]
