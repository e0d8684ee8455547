"""CUDA: the driver, the runtime API, device memory and streams."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.engines.backends.cuda.driver import (
        Driver, Gpu, Problem, Variant, find_driver, fitting_extras, pip_install,
    )
    from sdxl_trt.engines.backends.cuda.memory import DeviceBuffer, PinnedBuffer
    from sdxl_trt.engines.backends.cuda.runtime import REMEDY, Cuda, Usage, cuda_runtime
    from sdxl_trt.engines.backends.cuda.streams import Graph, Stream
else:
    __getattr__ = lazy_names(__name__, {
        "driver": ("Driver", "Gpu", "Problem", "Variant", "find_driver", "fitting_extras", "pip_install"),
        "memory": ("DeviceBuffer", "PinnedBuffer"),
        "runtime": ("REMEDY", "Cuda", "Usage", "cuda_runtime"),
        "streams": ("Graph", "Stream"),
    })

__all__ = [
    "REMEDY", "Cuda", "DeviceBuffer", "Driver", "Gpu", "Graph", "PinnedBuffer", "Problem", "Stream", "Usage", "Variant",
    "cuda_runtime", "find_driver", "fitting_extras", "pip_install",
]
