"""The backends that run a graph: ONNX Runtime, TensorRT and OpenVINO."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.engines.backends.open import check_compute_precision, open_backend
else:
    __getattr__ = lazy_names(__name__, {
        "open": ("check_compute_precision", "open_backend"),
    })

__all__ = ["check_compute_precision", "open_backend"]
