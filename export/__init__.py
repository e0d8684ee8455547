"""SDXL checkpoints to ONNX bundles: the only home of torch, diffusers and transformers."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.export.components import Options, VaePrecision
    from sdxl_trt.export.exporter import MINI, export_bundle, export_optimum, plan_export
else:
    __getattr__ = lazy_names(__name__, {
        "components": ("Options", "VaePrecision"),
        "exporter": ("MINI", "export_bundle", "export_optimum", "plan_export"),
    })

__all__ = ["MINI", "Options", "VaePrecision", "export_bundle", "export_optimum", "plan_export"]
