"""A request, and the same request resolved against a bundle."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.runtime.request.handoff import DEFAULT_HANDOFF, StepRange, step_at_fraction
    from sdxl_trt.runtime.request.masking import takes_mask
    from sdxl_trt.runtime.request.request import (
        COMFYUI_SCHEDULES, GROUPS, MAX_SEED, SAMPLERS, Request, parse_size,
    )
    from sdxl_trt.runtime.request.resolve import DRAWN_SEED_BITS, ResolvedRequest, resolve_request, workload_of
    from sdxl_trt.runtime.request.settings import Setting, check_settings, defaults, record_fields, settings_of
    from sdxl_trt.runtime.request.side import Side, SideMix, StageName
    from sdxl_trt.runtime.request.sides import ResolvedSide, most_skipped
else:
    __getattr__ = lazy_names(__name__, {
        "handoff": ("DEFAULT_HANDOFF", "StepRange", "step_at_fraction"),
        "masking": ("takes_mask",),
        "request": ("COMFYUI_SCHEDULES", "GROUPS", "MAX_SEED", "SAMPLERS", "Request", "parse_size"),
        "resolve": ("DRAWN_SEED_BITS", "ResolvedRequest", "resolve_request", "workload_of"),
        "settings": ("Setting", "check_settings", "defaults", "record_fields", "settings_of"),
        "side": ("Side", "SideMix", "StageName"),
        "sides": ("ResolvedSide", "most_skipped"),
    })

__all__ = [
    "COMFYUI_SCHEDULES", "DEFAULT_HANDOFF", "DRAWN_SEED_BITS", "GROUPS", "MAX_SEED", "SAMPLERS", "Request",
    "ResolvedRequest", "ResolvedSide", "Setting", "Side", "SideMix", "StageName", "StepRange", "check_settings",
    "defaults", "most_skipped", "parse_size", "record_fields", "resolve_request", "settings_of",
    "step_at_fraction", "takes_mask", "workload_of",
]
