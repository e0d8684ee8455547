"""ComfyUI's API: graphs to draw, their history, pictures, menus, and the websocket that tells of progress."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.server.comfyui.graphs import run_graph
    from sdxl_trt.server.comfyui.routes import router
else:
    __getattr__ = lazy_names(__name__, {"graphs": ("run_graph",), "routes": ("router",)})

__all__ = ["router", "run_graph"]
