"""The memory estimate of a run that is not run: for this machine, or for a device of another size."""

__all__ = ["changed_weights", "estimate_run"]

import msgspec

from sdxl_trt.engines.adapters import adapted as with_loras
from sdxl_trt.engines.adapters import component_role, loras_of, targets
from sdxl_trt.engines.backends import check_compute_precision, open_backend
from sdxl_trt.engines.bundle import USUAL_RUN, Bundle, Workload, fixed, read_table
from sdxl_trt.engines.plans import PlanLimits, RunSizes, Sizes, check_for, plan_limits, stage_sizes
from sdxl_trt.engines.residency import MemoryEstimate, estimate_memory, settled_residency
from sdxl_trt.runtime.request import Request, resolve_request


def changed_weights(request: Request, bundle: Bundle) -> dict[str, int]:
    """Return the bytes of each component's weights that a request's LoRAs change.

    Raises what resolving the request raises.
    """
    resolved = resolve_request(request, bundle.manifest, None, bundle)
    found: dict[str, int] = {}
    for name, loras in resolved.loras.items():
        stage = bundle.manifest.stages()[name]
        for component in (stage.unet, *(encoder.component for encoder in stage.text_encoders)):
            use = with_loras(component, loras)
            table, config = read_table(bundle, component), bundle.manifest.components[component].config
            names = {target for each in loras_of(use) for role in [component_role(component)] if role is not None
                     for target in targets(each.lora, role, table.shapes, config)}  # fmt: skip
            if names:
                found[component] = sum(table.by_name[target].nbytes for target in names)
    return found


def estimate_run(
    bundle: Bundle,
    provider: str = "auto",
    residency: str = "auto",
    vram: int | None = None,
    width: int | None = None,
    height: int | None = None,
    *,
    workload: Workload = USUAL_RUN,
    compute_precision: str = "auto",
) -> MemoryEstimate:
    """Return the memory that a run of `bundle` with `workload` takes, and a residency that fits.

    With `vram` bytes no GPU is needed, and "auto" means tensorrt. `width` and `height` are pixels of a single size: it
    selects the profiles of built plans, and plans that are not built are estimated for it.
    `compute_precision` is that of `open_bundle`.
    Raises UsageError, SizeError, and IncompatibleError for a missing provider.
    """
    sizes = _sizes(bundle, width, height)
    if vram is not None:
        check_compute_precision(provider, compute_precision)
        chosen = "tensorrt" if provider == "auto" else provider
        records = [record for record in bundle.manifest.plans
                   if record.key.environment.flavour == chosen and not record.for_loras]  # fmt: skip
        return estimate_memory(bundle, provider=chosen, capacity=vram, residency=residency, sizes=sizes,
                               workload=workload, run=_run_of(sizes, plan_limits(bundle, records)))  # fmt: skip
    backend = open_backend(bundle, provider, compute_precision)
    backend.close()
    residency = settled_residency(residency, backend.provider, once=True)
    slotted = {name: record for name, record in backend.slot_records.items() if name in workload.adapted}
    return estimate_memory(
        bundle,
        provider=backend.provider,
        capacity=backend.free,
        residency=residency,
        sizes=sizes,
        records={**backend.records, **slotted},
        workload=workload,
        capability=backend.capability,
        run=_run_of(sizes, backend.limits),
    )


def _sizes(bundle: Bundle, width: int | None, height: int | None) -> Sizes | None:
    if width is None and height is None:
        return None
    usual = stage_sizes(bundle.manifest)
    sides = {name: fixed(side or getattr(usual, name).opt) for name, side in (("width", width), ("height", height))}
    sizes = msgspec.structs.replace(usual, **sides)
    check_for(bundle.manifest, sizes)
    return sizes


def _run_of(sizes: Sizes | None, limits: PlanLimits | None) -> RunSizes | None:
    """Return the sizes of a run for one picture with guidance, as plans with `limits` run it; None without `sizes`."""
    if sizes is None:
        return None
    pictures, tokens = (sizes.batch.opt, sizes.tokens.opt) if limits is None else (limits.fewest, limits.tokens.min)
    return RunSizes(height=sizes.height.opt, width=sizes.width.opt, rows=2 * pictures, tokens=tokens)
