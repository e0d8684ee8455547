"""A request, and the same request resolved against a bundle."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.runtime.request.handoff import StepRange, step_at_fraction
    from sdxl_trt.runtime.request.request import Request
    from sdxl_trt.runtime.request.resolve import DRAWN_SEED_BITS, ResolvedRequest, resolve_request
    from sdxl_trt.runtime.request.sides import ResolvedSide, Side, SideMix, StageName, most_skipped
else:
    __getattr__ = lazy_names(__name__, {
        "handoff": ("StepRange", "step_at_fraction"),
        "request": ("Request",),
        "resolve": ("DRAWN_SEED_BITS", "ResolvedRequest", "resolve_request"),
        "sides": ("ResolvedSide", "Side", "SideMix", "StageName", "most_skipped"),
    })

__all__ = [
    "DRAWN_SEED_BITS", "Request", "ResolvedRequest", "ResolvedSide", "Side", "SideMix", "StageName", "StepRange",
    "most_skipped", "resolve_request", "step_at_fraction",
]
