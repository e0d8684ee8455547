"""The checks of gpu-check by theme, and the state that they share on disk."""

from sdxl_trt.benchmarks.gpu_check.checks.findings import Failed, Finding, Skipped
from sdxl_trt.benchmarks.gpu_check.checks.order import Check, all_checks
from sdxl_trt.benchmarks.gpu_check.checks.workplace import Workplace, make_workplace

__all__ = ["Check", "Failed", "Finding", "Skipped", "Workplace", "all_checks", "make_workplace"]
