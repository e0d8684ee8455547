"""Ray: an ingress with the same APIs and queue, pools of devices that draw, and lists of prompts."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.server.ray.layout import ASSUMED, Layout, Seconds, choose_layout, parse_seconds
else:
    __getattr__ = lazy_names(__name__, {
        "layout": ("ASSUMED", "Layout", "Seconds", "choose_layout", "parse_seconds"),
    })

__all__ = ["ASSUMED", "Layout", "Seconds", "choose_layout", "parse_seconds"]
