"""The components that a base and a refiner need: which graphs, how each is converted, and at what cost."""

from sdxl_trt.export.components.budget import Needs, measure
from sdxl_trt.export.components.components import ComponentPlan, StagePlan, plan_components, time_id_names
from sdxl_trt.export.components.controlnets import add_controlnets, controlnet_records
from sdxl_trt.export.components.convert import (
    CPU_GRAPH_FILE, GRAPH_FILE, RANGES_FILE, RECORD_FILE, REVISION, SLOT_GRAPH_FILE, component_key, convert_component,
    finished,
)
from sdxl_trt.export.components.files import file_record, save_graph
from sdxl_trt.export.components.jobs import ExportJob, plan_jobs
from sdxl_trt.export.components.options import TINY, CalibrationOptions, Options, VaePrecision
from sdxl_trt.export.components.progress import ExportEvent, ExportProgress, ProgressTracker
from sdxl_trt.export.components.recipes import RUN_ORDER, with_recipes
from sdxl_trt.export.components.shallow import Exported, ShallowFiles
from sdxl_trt.export.components.stages import stage_record, write_tokenizers

__all__ = [
    "CPU_GRAPH_FILE", "GRAPH_FILE", "RANGES_FILE", "RECORD_FILE", "REVISION", "RUN_ORDER", "SLOT_GRAPH_FILE", "TINY",
    "CalibrationOptions", "ComponentPlan", "ExportEvent", "ExportJob", "ExportProgress", "Exported", "Needs", "Options",
    "ProgressTracker", "ShallowFiles", "StagePlan", "VaePrecision", "add_controlnets", "component_key",
    "controlnet_records", "convert_component", "file_record", "finished", "measure", "plan_components", "plan_jobs",
    "save_graph", "stage_record", "time_id_names", "with_recipes", "write_tokenizers",
]
