"""CUDA: the runtime API, device memory and streams."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.engines.backends.cuda.memory import DeviceBuffer, PinnedBuffer
    from sdxl_trt.engines.backends.cuda.runtime import REMEDY, Cuda, Usage, cuda_runtime
    from sdxl_trt.engines.backends.cuda.streams import Graph, Stream
else:
    __getattr__ = lazy_names(__name__, {
        "memory": ("DeviceBuffer", "PinnedBuffer"),
        "runtime": ("REMEDY", "Cuda", "Usage", "cuda_runtime"),
        "streams": ("Graph", "Stream"),
    })

__all__ = ["REMEDY", "Cuda", "DeviceBuffer", "Graph", "PinnedBuffer", "Stream", "Usage", "cuda_runtime"]
