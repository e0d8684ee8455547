"""How much a faster picture differs: UNet time against the difference to the full run, for many settings."""

from sdxl_trt.benchmarks.pareto.points import POINTS, Point

__all__ = ["POINTS", "Point"]
