"""The ControlNets of an export: their components, and whether they fit the base."""

__all__ = ["add_controlnets", "controlnet_records"]

from collections.abc import Callable, Sequence
from dataclasses import replace

from sdxl_trt.engines import SourceError, UsageError
from sdxl_trt.engines.bundle import ControlNet
from sdxl_trt.export.checkpoints import resolve_names
from sdxl_trt.export.components.components import ComponentPlan, StagePlan
from sdxl_trt.export.graph import MetaModel, build_model, context_width, make_graph, residual_shapes, vae_factor
from sdxl_trt.export.sources import ControlNetSource


def add_controlnets(
    components: dict[str, ComponentPlan],
    base: StagePlan,
    controlnets: Sequence[ControlNetSource],
    warn: Callable[[str], None],
) -> None:
    """Add the `controlnets` to the `components` and to the `base`, whose UNet then takes their residuals.

    They are called controlnet, controlnet_2 and so on. Raises SourceError for one that does not fit the base,
    UsageError for two of one name.
    """
    names = [each.name for each in controlnets]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"--controlnet: two are called {twice!r}; rename one of the files, since a run names them")
    if not controlnets:
        return
    unet = components["unet"]
    components["unet"] = replace(unet, residuals=True)
    for number, each in enumerate(controlnets, start=1):
        source = each.model
        model = build_model(source.class_name, source.config, source.where)
        _check_fits(model, base, source.where)
        checkpoint = resolve_names(source.checkpoint(), model.state, source.where, warn)
        plan = replace(unet, kind="controlnet", source=source, model=model, checkpoint=checkpoint, residuals=True)
        make_graph(plan.kind, model, time_ids=plan.time_ids, pooled=plan.pooled, where=source.where)
        name = "controlnet" if number == 1 else f"controlnet_{number}"
        components[name] = plan
        base.controlnets[name] = each.name


def controlnet_records(base: StagePlan) -> tuple[ControlNet, ...]:
    """Return the manifest's records of the base's ControlNets."""
    return tuple(ControlNet(component=component, name=name) for component, name in base.controlnets.items())


def _check_fits(model: MetaModel, base: StagePlan, where: str) -> None:
    """Raise SourceError unless the base's UNet takes the residuals of the ControlNet `model`, for its latents."""
    config, unet = model.config, base.models["unet"].config
    latents = base.models["vae"].config["latent_channels"]
    if unet["in_channels"] != latents:
        raise SourceError(f"{where}: a ControlNet takes a base of {latents} channels, and this one is an inpainting"
                          f" model with {unet['in_channels']}; leave --controlnet out, or export a base of {latents}"
                          " channels, which takes masks too")  # fmt: skip
    factor = vae_factor(base.models["vae"].config)
    sides = 2 ** (len(config["conditioning_embedding_out_channels"]) - 1)
    pairs = (
        ("residuals", residual_shapes(config), residual_shapes(unet)),
        ("input channels", config["in_channels"], unet["in_channels"]),
        ("context width", context_width(config), context_width(unet)),
        ("pixels per latent", sides, factor),
    )
    for what, its, ours in pairs:
        if its != ours:
            said = "other residuals than" if what == "residuals" else f"{what} {its}, not {ours} as"
            raise SourceError(f"{where}: has {said} the base's UNet, so it belongs to another model; give a ControlNet"
                              " of this base")  # fmt: skip
