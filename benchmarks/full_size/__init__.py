"""Exports and builds of models at SDXL's real size."""

from sdxl_trt.benchmarks.full_size.architectures import ROLES, architecture
from sdxl_trt.benchmarks.full_size.checkpoints import write_checkpoint

__all__ = ["ROLES", "architecture", "write_checkpoint"]
