"""Exports and builds of models at SDXL's real size."""

from sdxl_trt.benchmarks.full_size.architectures import ROLES, architecture

__all__ = ["ROLES", "architecture"]
