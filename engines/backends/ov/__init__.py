"""OpenVINO: engines on a CPU, in fp32 or in bf16."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.engines.backends.ov.engine import OvEngine
    from sdxl_trt.engines.backends.ov.library import (
        COMPUTE_PRECISIONS, ComputePrecision, openvino_core, settled_precision,
    )
    from sdxl_trt.engines.backends.ov.placing import place_weights
else:
    __getattr__ = lazy_names(__name__, {
        "engine": ("OvEngine",),
        "library": ("COMPUTE_PRECISIONS", "ComputePrecision", "openvino_core", "settled_precision"),
        "placing": ("place_weights",),
    })

__all__ = [
    "COMPUTE_PRECISIONS", "ComputePrecision", "OvEngine", "openvino_core", "place_weights", "settled_precision",
]
