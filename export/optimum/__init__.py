"""The same models in optimum-onnx's layout."""

from sdxl_trt.export.optimum.layout import write_optimum

__all__ = ["write_optimum"]
