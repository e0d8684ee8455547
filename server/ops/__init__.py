"""Operations: health, metrics, logs of requests, traces, and reloads."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.server.ops.health import metrics_app, router
    from sdxl_trt.server.ops.logs import log_request
    from sdxl_trt.server.ops.metrics import Metrics
    from sdxl_trt.server.ops.operations import Operations
    from sdxl_trt.server.ops.reloading import Reloader
    from sdxl_trt.server.ops.traces import Traces
else:
    __getattr__ = lazy_names(__name__, {
        "health": ("metrics_app", "router"),
        "logs": ("log_request",),
        "metrics": ("Metrics",),
        "operations": ("Operations",),
        "reloading": ("Reloader",),
        "traces": ("Traces",),
    })

__all__ = ["Metrics", "Operations", "Reloader", "Traces", "log_request", "metrics_app", "router"]
