"""LoRAs in a private copy of mapped weights, for the backends that read the weights file itself."""

from sdxl_trt.engines.backends.patched.patch import Patch, plan_patch

__all__ = ["Patch", "plan_patch"]
