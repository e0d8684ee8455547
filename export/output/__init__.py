"""The folder that an export writes."""

from sdxl_trt.export.output.reuse import previous_bundle, take_over, take_over_plans
from sdxl_trt.export.output.staging import OPTIMUM_FORMAT, check_target, exclusive, publish, resumable, staged_folder

__all__ = [
    "OPTIMUM_FORMAT", "check_target", "exclusive", "previous_bundle", "publish", "resumable", "staged_folder",
    "take_over", "take_over_plans",
]
