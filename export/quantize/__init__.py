"""8-bit graphs from float ones: measured ranges, and two graphs over one set of 8-bit weights."""

from sdxl_trt.export.quantize.check import check_calibration
from sdxl_trt.export.quantize.component import EightBitJob, quantize_component
from sdxl_trt.export.quantize.prompts import shipped_prompts
from sdxl_trt.export.quantize.quantize import quantize_components

__all__ = ["EightBitJob", "check_calibration", "quantize_component", "quantize_components", "shipped_prompts"]
