"""Opening the pool of a bundle: its backend, its residency and what it keeps are settled before anything is loaded."""

__all__ = ["open_pool"]

from functools import partial

from sdxl_trt.engines.backends import open_backend
from sdxl_trt.engines.bundle import USUAL_RUN, Bundle, Workload, run_components, stand_ins
from sdxl_trt.engines.residency.estimate import MemoryEstimate
from sdxl_trt.engines.residency.policy import (
    can_run,
    check_residency,
    estimate_memory,
    fallbacks,
    optional_components,
    settled_residency,
)
from sdxl_trt.engines.residency.pool import EnginePool


def open_pool(
    bundle: Bundle,
    provider: str = "auto",
    residency: str = "auto",
    available: int | None = None,
    *,
    workload: Workload = USUAL_RUN,
    once: bool = False,
    compute_precision: str = "auto",
) -> EnginePool:
    """Return a pool for `bundle`; nothing is loaded yet, but a thread begins to read the plans of a run.

    `provider` is "auto" or one of PROVIDERS, `residency` "auto", "resident", "swap" or "stream"; `available` replaces
    the measured memory of the device or host, in bytes. Memory is planned for runs with `workload`; with `once`, for a
    single one. `compute_precision` is that of `open_backend`.
    A given residency is kept; "auto" falls back to the next one if memory runs out. Raises UsageError for unknown
    names and a tiny decoder that the bundle lacks, IncompatibleError for a provider that is not available, a plan that
    does not fit this machine or a shallow UNet that the bundle lacks, ResourceError for plans that cannot fit.
    """
    check_residency(residency)
    run_components(bundle.manifest, provider, workload)  # raises before a device is opened
    backend = open_backend(bundle, provider, compute_precision)
    capacity = backend.free if available is None else available
    residency = settled_residency(residency, backend.provider, once=once)
    estimate = partial(
        estimate_memory,
        bundle,
        provider=backend.provider,
        capacity=capacity,
        records=backend.records,
        workload=workload,
        capability=backend.capability,
    )
    try:
        plan = estimate(residency=residency)
        _require_room(plan)
    except BaseException:
        backend.close()
        raise
    pool = EnginePool(
        bundle,
        backend.make,
        plan.residency,
        backend.provider,
        keeps=plan.keeps,
        optional=optional_components(plan, bundle.manifest, estimate),
        fallbacks=fallbacks(plan) if residency == "auto" else (),
        budgets=plan.budgets or {need.component: need.streamable // 2 for need in plan.needs if need.streamable},
        replaced=stand_ins(bundle.manifest, backend.provider, backend.capability),
        records=backend.records,
        slot_records=backend.slot_records,
        limits=backend.limits,
        activations={need.component: need.activations for need in plan.needs} if backend.records else None,
        estimate=estimate,
        workload=workload,
        close=backend.close,
        memory=backend.memory,
        computes=backend.computes,
    )
    pool.expect(run_components(bundle.manifest, backend.provider, workload, capability=backend.capability))
    return pool


def _require_room(plan: MemoryEstimate) -> None:
    """Raise ResourceError if not even the smallest profiles of the plans fit."""
    if not can_run(plan, plan.least_peak):
        raise plan.refusal()
