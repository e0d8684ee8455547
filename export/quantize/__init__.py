"""8-bit graphs from float ones: measured ranges, and two graphs over one set of 8-bit weights."""

from sdxl_trt.export.quantize.check import check_calibration
from sdxl_trt.export.quantize.quantize import quantize_components

__all__ = ["check_calibration", "quantize_components"]
