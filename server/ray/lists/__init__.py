"""Lists of prompts through Ray Data, resumable."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.server.ray.lists.entries import draw_list
else:
    __getattr__ = lazy_names(__name__, {"entries": ("draw_list",)})

__all__ = ["draw_list"]
