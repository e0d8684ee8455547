"""Quality of a bundle's pictures against PyTorch, stage by stage."""

from sdxl_trt.benchmarks.quality.quality import VARIANTS, measure_quality, verdict

__all__ = ["VARIANTS", "measure_quality", "verdict"]
