"""The output folder of an export: staging, locking, publishing, reuse of the previous bundle."""

from sdxl_trt.export.output.reuse import is_whole, previous_bundle, sound_component, take_over, take_over_plans
from sdxl_trt.export.output.staging import (
    OPTIMUM_FORMAT, check_target, exclusive, partial_folder, publish, resumable, staged_folder,
)

__all__ = [
    "OPTIMUM_FORMAT", "check_target", "exclusive", "is_whole", "partial_folder", "previous_bundle", "publish",
    "resumable", "sound_component", "staged_folder", "take_over", "take_over_plans",
]
