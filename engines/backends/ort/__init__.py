"""ONNX Runtime: engines, execution providers and the cache of engines compiled by TensorRT."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.engines.backends.ort.engine import OrtEngine
    from sdxl_trt.engines.backends.ort.probe import CUDA, TENSORRT, provider_problem
    from sdxl_trt.engines.backends.ort.products import EXACT_PRODUCTS, saturates
    from sdxl_trt.engines.backends.ort.providers import (
        ORT_PROVIDERS, OrtProvider, choose_provider, plugin_devices, shape_limits,
    )
else:
    __getattr__ = lazy_names(__name__, {
        "engine": ("OrtEngine",),
        "probe": ("CUDA", "TENSORRT", "provider_problem"),
        "products": ("EXACT_PRODUCTS", "saturates"),
        "providers": (
            "ORT_PROVIDERS", "OrtProvider", "choose_provider", "plugin_devices", "shape_limits",
        ),
    })

__all__ = [
    "CUDA", "EXACT_PRODUCTS", "ORT_PROVIDERS", "TENSORRT", "OrtEngine", "OrtProvider", "choose_provider",
    "plugin_devices", "provider_problem", "saturates", "shape_limits",
]
