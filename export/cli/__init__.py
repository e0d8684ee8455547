"""The command export-engines."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.export.cli.export import main
else:
    __getattr__ = lazy_names(__name__, {
        "export": ("main",),
    })

__all__ = ["main"]
