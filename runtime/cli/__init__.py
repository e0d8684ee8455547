"""The command trt-generate."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.runtime.cli.generate import main
else:
    __getattr__ = lazy_names(__name__, {
        "generate": ("main",),
    })

__all__ = ["main"]
