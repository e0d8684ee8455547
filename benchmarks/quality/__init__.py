"""Quality of a bundle's pictures against PyTorch, stage by stage."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.benchmarks.quality.likeness import psnr
    from sdxl_trt.benchmarks.quality.limits import limit_of
    from sdxl_trt.benchmarks.quality.quality import VARIANTS, measure_quality, verdict
else:
    __getattr__ = lazy_names(__name__, {
        "likeness": ("psnr",),
        "limits": ("limit_of",),
        "quality": ("VARIANTS", "measure_quality", "verdict"),
    })

__all__ = ["VARIANTS", "limit_of", "measure_quality", "psnr", "verdict"]
