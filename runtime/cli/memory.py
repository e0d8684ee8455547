"""The memory estimate of a run that is not run: for this machine, or for a device of another size."""

__all__ = ["changed_weights", "estimate_run"]

from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec

from sdxl_trt.engines.adapters import adapted as with_loras
from sdxl_trt.engines.adapters import component_role, loras_of, targets
from sdxl_trt.engines.backends import check_compute_precision, open_backend
from sdxl_trt.engines.bundle import Bundle, fixed, read_bundle, read_table
from sdxl_trt.engines.plans import PlanLimits, RunSizes, Sizes, check_for, plan_limits, stage_sizes
from sdxl_trt.engines.residency import MemoryEstimate, estimate_memory, settled_residency
from sdxl_trt.runtime.controls import ControlUse, control_components
from sdxl_trt.runtime.request import Request, resolve_request


def changed_weights(request: Request, path: Path | str | None = None) -> dict[str, int]:
    """Return the bytes of each component's weights that a request's LoRAs change, for a bundle as in `estimate_run`.

    Raises what resolving the request raises.
    """
    bundle = _bundle(path)
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


def _bundle(path: Path | str | None) -> Bundle:
    if path is None:
        from sdxl_trt.mini import bundle_path  # noqa: PLC0415 - package data, only when nothing else is named

        path = bundle_path()
    return read_bundle(path)


def estimate_run(
    path: Path | str | None = None,
    provider: str = "auto",
    residency: str = "auto",
    vram: int | None = None,
    width: int | None = None,
    height: int | None = None,
    *,
    from_image: bool = False,
    controls: Sequence[ControlUse] = (),
    adapted: Collection[str] = (),
    cached: bool = False,
    compute_precision: str = "auto",
    tiny: bool = False,
) -> MemoryEstimate:
    """Return the memory that a run of the bundle at `path` (None: the embedded pair) takes, and a residency that fits.

    With `vram` bytes no GPU is needed, and "auto" means tensorrt. `width` and `height` are pixels of a single size: it
    selects the profiles of built plans, and plans that are not built are estimated for it. `from_image` is for runs
    that start from pictures, `controls` for those whose ControlNets follow pictures, `adapted` names the
    components that LoRAs change; `cached` runs have a step cache, `tiny` ones decode with the tiny decoder;
    `compute_precision` is that of `open_bundle`.
    Raises SourceError, CorruptError, UsageError, SizeError, and IncompatibleError for a missing provider.
    """
    bundle = _bundle(path)
    sizes, nets = _sizes(bundle, width, height), control_components(controls, bundle.manifest)
    if vram is not None:
        check_compute_precision(provider, compute_precision)
        chosen = "tensorrt" if provider == "auto" else provider
        records = [record for record in bundle.manifest.plans
                   if record.key.environment.flavour == chosen and not record.for_loras]  # fmt: skip
        return estimate_memory(bundle, provider=chosen, capacity=vram, residency=residency, sizes=sizes,
                               from_image=from_image, controls=nets, adapted=adapted, cached=cached, tiny=tiny,
                               run=_run_of(sizes, plan_limits(bundle, records)))  # fmt: skip
    backend = open_backend(bundle, provider, compute_precision)
    backend.close()
    residency = settled_residency(residency, backend.provider, once=True)
    slotted = {name: record for name, record in backend.slot_records.items() if name in adapted}
    return estimate_memory(
        bundle,
        provider=backend.provider,
        capacity=backend.free,
        residency=residency,
        sizes=sizes,
        records={**backend.records, **slotted},
        from_image=from_image,
        controls=nets,
        adapted=adapted,
        cached=cached,
        tiny=tiny,
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
