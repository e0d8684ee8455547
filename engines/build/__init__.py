"""Build TensorRT plans from ONNX graphs, one process per plan."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.engines.build.builder import PlanFile
    from sdxl_trt.engines.build.bundle_plans import build_plans, drop_onnx
    from sdxl_trt.engines.build.jobs import PlanJob, plan_builds
    from sdxl_trt.engines.build.messages import BuildJob, BuiltPlan
    from sdxl_trt.engines.build.network import BuildLog, parse_graph
    from sdxl_trt.engines.build.process import build_plan, build_progress
else:
    __getattr__ = lazy_names(__name__, {
        "builder": ("PlanFile",),
        "bundle_plans": ("build_plans", "drop_onnx"),
        "jobs": ("PlanJob", "plan_builds"),
        "messages": ("BuildJob", "BuiltPlan"),
        "network": ("BuildLog", "parse_graph"),
        "process": ("build_plan", "build_progress"),
    })

__all__ = [
    "BuildJob", "BuildLog", "BuiltPlan", "PlanFile", "PlanJob", "build_plan", "build_plans", "build_progress",
    "drop_onnx", "parse_graph", "plan_builds",
]
