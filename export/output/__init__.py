"""The folder that an export writes."""

from sdxl_trt.export.output.budget import Needs, measure
from sdxl_trt.export.output.jobs import ExportJob, plan_jobs
from sdxl_trt.export.output.reuse import previous_bundle, take_over, take_over_plans
from sdxl_trt.export.output.stages import stage_record, write_tokenizers
from sdxl_trt.export.output.staging import OPTIMUM_FORMAT, check_target, exclusive, publish, resumable, staged_folder

__all__ = [
    "OPTIMUM_FORMAT", "ExportJob", "Needs", "check_target", "exclusive", "measure", "plan_jobs", "previous_bundle",
    "publish", "resumable", "stage_record", "staged_folder", "take_over", "take_over_plans", "write_tokenizers",
]
