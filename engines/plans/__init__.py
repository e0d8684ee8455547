"""TensorRT plans in a bundle: which one to use, for which sizes, and why one does not fit."""

from sdxl_trt.engines.plans.files import PLANS, plan_path, rebuild_command, remove_write_permission, start_reading
from sdxl_trt.engines.plans.limits import PlanLimits, plan_limits
from sdxl_trt.engines.plans.lookup import (
    find_plan, has_plans, plan_notes, planned_components, preferred_plan, why_rebuild,
)
from sdxl_trt.engines.plans.reading import PlanReader, plan_memory
from sdxl_trt.engines.plans.shapes import (
    RunSizes, Shapes, choose_profile, outside_profiles, profile_for_run, reachable, usual_profile,
)
from sdxl_trt.engines.plans.sizes import (
    ADAPTED, MAX_ROWS_OF_PROMPTS, MAX_VECTORS, MOST_RANK, SUGGESTED_RANK, TILE, TOKENS, Sizes, axes_of, check_for,
    component_profiles, default_sizes, parse_range, profiles_of, rank_range, size_multiple, stage_sizes,
)

__all__ = [
    "ADAPTED", "MAX_ROWS_OF_PROMPTS", "MAX_VECTORS", "MOST_RANK", "PLANS", "SUGGESTED_RANK", "TILE", "TOKENS",
    "PlanLimits", "PlanReader", "RunSizes", "Shapes", "Sizes", "axes_of", "check_for", "choose_profile",
    "component_profiles", "default_sizes", "find_plan", "has_plans", "outside_profiles", "parse_range", "plan_limits",
    "plan_memory", "plan_notes", "plan_path", "planned_components", "preferred_plan", "profile_for_run", "profiles_of",
    "rank_range", "reachable", "rebuild_command", "remove_write_permission", "size_multiple", "stage_sizes",
    "start_reading", "usual_profile", "why_rebuild",
]
