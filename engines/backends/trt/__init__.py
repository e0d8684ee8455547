"""TensorRT and TensorRT for RTX: engines that run plans."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.engines.backends.trt.api import library_version, make_logger, tensorrt_module
    from sdxl_trt.engines.backends.trt.device import open_device
    from sdxl_trt.engines.backends.trt.engine import TrtEngine
    from sdxl_trt.engines.backends.trt.environment import current_environment, device_available
else:
    __getattr__ = lazy_names(__name__, {
        "api": ("library_version", "make_logger", "tensorrt_module"),
        "device": ("open_device",),
        "engine": ("TrtEngine",),
        "environment": ("current_environment", "device_available"),
    })

__all__ = [
    "TrtEngine", "current_environment", "device_available", "library_version", "make_logger", "open_device",
    "tensorrt_module",
]
