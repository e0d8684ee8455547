"""When to load and free engines, and how much memory they need."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.engines.residency.activations import estimate_activations, estimate_error, score_bytes
    from sdxl_trt.engines.residency.estimate import MemoryEstimate
    from sdxl_trt.engines.residency.needs import exact_sizes
    from sdxl_trt.engines.residency.opening import open_pool
    from sdxl_trt.engines.residency.policy import RESIDENCIES, estimate_memory, settled_residency
    from sdxl_trt.engines.residency.pool import EnginePool
else:
    __getattr__ = lazy_names(__name__, {
        "activations": ("estimate_activations", "estimate_error", "score_bytes"),
        "estimate": ("MemoryEstimate",),
        "needs": ("exact_sizes",),
        "opening": ("open_pool",),
        "policy": ("RESIDENCIES", "estimate_memory", "settled_residency"),
        "pool": ("EnginePool",),
    })

__all__ = [
    "RESIDENCIES", "EnginePool", "MemoryEstimate", "estimate_activations", "estimate_error", "estimate_memory",
    "exact_sizes", "open_pool", "score_bytes", "settled_residency",
]
