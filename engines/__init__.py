"""Run ONNX graphs and TensorRT plans: numpy in, numpy out. No torch."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.engines.build import build_plans
    from sdxl_trt.engines.bundle import read_bundle
    from sdxl_trt.engines.engine import Array, DeviceArray, Engine, Value, numpy_dtype
    from sdxl_trt.engines.errors import (
        CorruptError, EngineError, IncompatibleError, ResourceError, SdxlTrtError, SizeError, SourceError, UsageError,
        VerificationError, explain_os_error,
    )
else:
    __getattr__ = lazy_names(__name__, {
        "build": ("build_plans",),
        "bundle": ("read_bundle",),
        "engine": ("Array", "DeviceArray", "Engine", "Value", "numpy_dtype"),
        "errors": (
            "CorruptError", "EngineError", "IncompatibleError", "ResourceError", "SdxlTrtError", "SizeError",
            "SourceError", "UsageError", "VerificationError", "explain_os_error",
        ),
    })

__all__ = [
    "Array", "CorruptError", "DeviceArray", "Engine", "EngineError", "IncompatibleError", "ResourceError",
    "SdxlTrtError", "SizeError", "SourceError", "UsageError", "Value", "VerificationError", "build_plans",
    "explain_os_error", "numpy_dtype", "read_bundle",
]
