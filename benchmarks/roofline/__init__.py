"""Estimated lower bounds of latency from FLOPs, bytes and published rates."""

from sdxl_trt.benchmarks.roofline.flops import count_component
from sdxl_trt.benchmarks.roofline.gemm import PRECISIONS, floor_seconds, measure_gemm
from sdxl_trt.benchmarks.roofline.roofline import run_estimate
from sdxl_trt.benchmarks.roofline.table import estimate_table

__all__ = ["PRECISIONS", "count_component", "estimate_table", "floor_seconds", "measure_gemm", "run_estimate"]
