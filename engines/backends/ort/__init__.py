"""ONNX Runtime: engines, execution providers and the cache of engines compiled by TensorRT."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.engines.backends.ort.engine import OrtEngine
    from sdxl_trt.engines.backends.ort.providers import ORT_PROVIDERS, OrtProvider, choose_provider, shape_limits
else:
    __getattr__ = lazy_names(__name__, {
        "engine": ("OrtEngine",),
        "providers": ("ORT_PROVIDERS", "OrtProvider", "choose_provider", "shape_limits"),
    })

__all__ = ["ORT_PROVIDERS", "OrtEngine", "OrtProvider", "choose_provider", "shape_limits"]
