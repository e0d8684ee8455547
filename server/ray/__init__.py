"""Ray: an ingress with the same APIs and queue, and pools of devices that draw."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.server.ray.cluster import Cluster, connected, planned
    from sdxl_trt.server.ray.deployments import built
    from sdxl_trt.server.ray.desk import open_ingress
    from sdxl_trt.server.ray.errands import Handover
    from sdxl_trt.server.ray.layout import Layout
    from sdxl_trt.server.ray.options import Deployed, Parts
    from sdxl_trt.server.ray.running import serve_by_ray
else:
    __getattr__ = lazy_names(__name__, {
        "cluster": ("Cluster", "connected", "planned"),
        "deployments": ("built",),
        "desk": ("open_ingress",),
        "errands": ("Handover",),
        "layout": ("Layout",),
        "options": ("Deployed", "Parts"),
        "running": ("serve_by_ray",),
    })

__all__ = [
    "Cluster", "Deployed", "Handover", "Layout", "Parts", "built", "connected", "open_ingress", "planned",
    "serve_by_ray",
]
