"""Ray: an ingress with the same APIs and queue, pools of devices that draw, and lists of prompts."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.server.ray.application import application
    from sdxl_trt.server.ray.cluster import Cluster
    from sdxl_trt.server.ray.lists import draw_list
    from sdxl_trt.server.ray.running import serve_by_ray
else:
    __getattr__ = lazy_names(__name__, {
        "application": ("application",),
        "cluster": ("Cluster",),
        "lists": ("draw_list",),
        "running": ("serve_by_ray",),
    })

__all__ = ["Cluster", "application", "draw_list", "serve_by_ray"]
