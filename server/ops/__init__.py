"""Operations: health, metrics, logs of requests, and the end of the server."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.server.ops.health import router
    from sdxl_trt.server.ops.logs import log_request
    from sdxl_trt.server.ops.metrics import Metrics
    from sdxl_trt.server.ops.stopping import drained
else:
    __getattr__ = lazy_names(__name__, {
        "health": ("router",),
        "logs": ("log_request",),
        "metrics": ("Metrics",),
        "stopping": ("drained",),
    })

__all__ = ["Metrics", "drained", "log_request", "router"]
