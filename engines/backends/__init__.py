"""The backends that run a graph: ONNX Runtime and TensorRT."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.engines.backends.open import open_backend
else:
    __getattr__ = lazy_names(__name__, {
        "open": ("open_backend",),
    })

__all__ = ["open_backend"]
