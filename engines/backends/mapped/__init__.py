"""Engines that map the bundle's weights: what they share, and LoRAs in a private copy of the map."""

from sdxl_trt.engines.backends.mapped.engine import MappedEngine
from sdxl_trt.engines.backends.mapped.patch import Patch, plan_patch

__all__ = ["MappedEngine", "Patch", "plan_patch"]
