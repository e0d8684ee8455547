"""Which graphs a base and a refiner need, and which of them they can share."""

__all__ = ["ComponentPlan", "StagePlan", "plan_components", "time_id_names"]

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

from sdxl_trt.engines import SourceError
from sdxl_trt.engines.adapters import COMPONENTS as LORA_COMPONENTS
from sdxl_trt.engines.adapters import LoraComponent, ScaledLora
from sdxl_trt.engines.bundle import EIGHT_BIT, Kind, Precision
from sdxl_trt.engines.plans import TOKENS
from sdxl_trt.export.checkpoints import Checkpoint, digest_tensors, resolve_names
from sdxl_trt.export.components.options import TINY, Options
from sdxl_trt.export.components.text_encoders import (
    find_pooled,
    open_tokenizers,
    tokenizer_role,
    without_idle_projection,
)
from sdxl_trt.export.graph import MetaModel, build_model, context_width, make_graph, vae_factor
from sdxl_trt.export.lora import check_fits, fuse_loras
from sdxl_trt.export.sources import LoadedTokenizer, ModelSource, PipelineSource

_SHALLOW_REVISION = 1
"""Increase it when UNets of the same model get other outputs for shallow UNets, or other shallow graphs."""
# Config entries that the host reads from the manifest, or that do not affect a graph.
_HOST_ONLY = {
    "architectures", "attn_implementation", "dtype", "force_upcast", "latents_mean", "latents_std", "sample_size",
    "scaling_factor", "shift_factor", "torch_dtype", "transformers_version",
}  # fmt: skip
_VAE_PRECISIONS: dict[str, Precision] = {"fp32": "fp32", "bf16": "bf16", "fp16": "fp16", "mixed": "mixed"}
_VAE_HALVES: dict[str, tuple[str, ...]] = {
    "vae_decoder": ("decoder.", "post_quant_conv."),
    "vae_encoder": ("encoder.", "quant_conv."),
}


@dataclass(frozen=True)
class ComponentPlan:
    """One graph to export: its source, its model on the meta device, its tensors under published names."""

    kind: Kind
    source: ModelSource
    model: MetaModel
    checkpoint: Checkpoint
    precision: Precision
    time_ids: int = 0
    pooled: int = 0
    tokens: int = TOKENS
    """Ids per prompt that a text encoder reads."""
    residuals: bool = False
    """Whether a UNet takes the residuals of a ControlNet."""
    floats: Precision | None = None
    """The precision of what does not compute in 8 bits; None: nothing computes in 8 bits."""
    recipe: str = ""
    """A digest of what determines the 8-bit layers of the component."""

    to_quantize: bool = False
    """Whether an 8-bit component is made of the exported one."""

    @property
    def eight_bit(self) -> bool:
        """Return whether its linear layers and convolutions are to compute in 8 bits."""
        return self.floats is not None

    def in_floats(self) -> "ComponentPlan":
        """Return the plan of the same component without 8-bit layers; itself, if it has none."""
        if self.floats is None:
            return self
        return self.revised(precision=self.floats, floats=None, recipe="", to_quantize=True)

    def revised(self, **changes: Any) -> "ComponentPlan":
        """Return the plan of the same tensors with other settings; the tensors are not read again for their digest."""
        plan = replace(self, **changes)
        if "digest" in self.__dict__:
            plan.__dict__["digest"] = self.digest
        return plan

    def tensor_names(self) -> list[str]:
        """Return the published names of this component's tensors: of an autoencoder, one half's."""
        halves = _VAE_HALVES.get(self.kind)
        return [name for name in self.model.state if halves is None or name.startswith(halves)]

    @cached_property
    def digest(self) -> str:
        """The sha256 of this component's tensors, with LoRAs fused; they are read once."""
        return digest_tensors(self.checkpoint, self.tensor_names())

    def bytes(self) -> int:
        """Return the approximate size of the weights in the bundle, in bytes."""
        size = 1 if self.eight_bit else 2 if self.precision in ("fp16", "bf16") else 4
        return size * sum(math.prod(self.model.state[name]) for name in self.tensor_names())

    def function(self) -> tuple[Any, ...]:
        """Return what determines the graph apart from weights: class, precision, resolved config, unusual length."""
        config = {k: v for k, v in self.model.config.items() if k not in _HOST_ONLY and not k.startswith("_")}
        # The usual length is left out, so that components exported by older versions keep their key.
        tokens = () if self.tokens == TOKENS else (self.tokens,)
        residuals = ("residuals",) if self.residuals else ()
        recipe = (self.floats, self.recipe) if self.eight_bit else ()
        # Components of other kinds keep the key of versions without shallow UNets.
        shallow = (("shallow", _SHALLOW_REVISION),) if self.kind == "unet" else ()
        return (
            self.kind,
            self.source.class_name,
            self.precision,
            sorted(config.items(), key=lambda item: item[0]),
            *tokens,
            *residuals,
            *recipe,
            *shallow,
            *(("to quantize",) if self.to_quantize else ()),
        )


@dataclass
class StagePlan:
    """One stage; `roles` maps unet, text_encoder, text_encoder_2, vae_decoder and vae_encoder to component names.

    `pooled_role` is the encoder whose text_embeds are the pooled prompt.
    """

    pipeline: PipelineSource
    models: dict[str, MetaModel]
    tokenizers: dict[str, LoadedTokenizer]
    pooled_role: str
    roles: dict[str, str] = field(default_factory=dict)
    controlnets: dict[str, str] = field(default_factory=dict)
    """The ControlNets' components, with the name that a run calls each."""

    def tokenizer_of(self, role: str) -> LoadedTokenizer:
        """Return the tokenizer of the text encoder `role`."""
        return self.tokenizers[tokenizer_role(role)]


def plan_components(
    base: PipelineSource,
    refiner: PipelineSource | None,
    options: Options,
    warn: Callable[[str], None],
    loras: Sequence[ScaledLora] = (),
) -> tuple[dict[str, ComponentPlan], dict[str, StagePlan]]:
    """Return {name: component} to export and {name: stage} that refer to them. LoRAs are fused into the base only.

    The refiner shares the base's encoder or autoencoder half if its graph and every tensor (name, dtype, shape, bytes)
    agree with the base's.
    """
    components: dict[str, ComponentPlan] = {}
    stages: dict[str, StagePlan] = {}
    for prefix, pipeline in (("", base), ("refiner_", refiner)):
        if pipeline is None:
            continue
        stage, plans = _plan_stage(pipeline, options, warn, () if prefix else loras)
        for role, plan in plans.items():
            twin = components.get(role)
            shared = bool(prefix) and twin is not None and _same(plan, twin)
            stage.roles[role] = role if shared else prefix + role
            if not shared:
                components[prefix + role] = plan
        stages["refiner" if prefix else "base"] = stage
    if refiner is not None:
        _check_latents(stages["base"], stages["refiner"], warn)
    return components, stages


def _check_latents(base: StagePlan, refiner: StagePlan, warn: Callable[[str], None]) -> None:
    """Raise SourceError unless the refiner can continue with the base's latents unchanged."""
    spans = [(len(stage.models["vae"].config["block_out_channels"]), stage.models["vae"].config["latent_channels"])
             for stage in (base, refiner)]  # fmt: skip
    if spans[0] != spans[1]:
        raise SourceError(
            f"{refiner.pipeline.root}: the autoencoder has {spans[1][0]} levels and {spans[1][1]} latent channels, the"
            f" base's has {spans[0][0]} and {spans[0][1]}; this refiner belongs to another base"
        )
    _check_schedulers(base.pipeline, refiner.pipeline, warn)


def _check_schedulers(base: PipelineSource, refiner: PipelineSource, warn: Callable[[str], None]) -> None:
    """Warn of the refiner's scheduler settings that are ignored; raise SourceError if a handoff is impossible."""
    ours, its = base.scheduler, refiner.scheduler
    if ours.told_log_sigma or its.told_log_sigma:
        which = base if ours.told_log_sigma else refiner
        raise SourceError(f"{which.root}: has EDM's schedule ({which.scheduler.class_name}), which does not support a"
                          " handoff; export the base with --no-refiner")  # fmt: skip
    # Each UNet keeps its own prediction type; class names are recorded but have no effect.
    fields = [name for name in its.__struct_fields__ if name not in ("class_name", "sampler", "prediction_type")]
    differing = [name for name in fields if getattr(its, name) != getattr(ours, name)]
    if differing:
        listed = ", ".join(f"{name} {getattr(its, name)!r}"[:100] for name in differing)
        warn(f"{refiner.root}: the scheduler has {listed}, unlike the base's; both stages use the base's schedule")
    if its.sampler != ours.sampler:
        warn(f"{refiner.root}: {its.class_name} means the sampler {its.sampler}; the base's, {ours.sampler}, is used"
             f" without --refiner-sampler {its.sampler}")  # fmt: skip


def _plan_stage(
    pipeline: PipelineSource, options: Options, warn: Callable[[str], None], loras: Sequence[ScaledLora]
) -> tuple[StagePlan, dict[str, ComponentPlan]]:
    models = {name: build_model(source.class_name, source.config, source.where)
              for name, source in pipeline.models.items()}  # fmt: skip
    pooled_role = find_pooled(models, pipeline)
    pipeline = without_idle_projection(pipeline, models, pooled_role, warn)
    checkpoints: dict[str, Checkpoint] = {}
    for name, source in pipeline.models.items():
        where = source.where
        checkpoints[name] = resolve_names(source.checkpoint(), models[name].state, where, warn)
    check_fits((each.lora for each in loras), models)
    for name in cast("list[LoraComponent]", [*models.keys() & {*LORA_COMPONENTS}] if loras else []):
        checkpoints[name] = fuse_loras(
            checkpoints[name], name, [(each.lora, each.on(name)) for each in loras], models[name].config
        )

    def plan(name: str, kind: Kind, precision: Precision, **signature: Any) -> ComponentPlan:
        return ComponentPlan(kind, pipeline.models[name], models[name], checkpoints[name], precision, **signature)

    _check_widths(models, pipeline, inpaints=not pipeline.requires_aesthetics_score)
    tokenizers = open_tokenizers(models, pipeline, warn)
    plans = {name: plan(name, "text_encoder", options.floats, tokens=tokenizers[tokenizer_role(name)].max_length)
             for name in models if name.startswith("text_")}  # fmt: skip
    pooled = int(models[pooled_role].config["projection_dim"])
    plans["unet"] = plan("unet", "unet", options.precision, time_ids=len(time_id_names(pipeline)), pooled=pooled,
                         floats=options.floats if options.precision in EIGHT_BIT else None)  # fmt: skip
    vae_precision = _vae_precision(models["vae"], options)
    eight_bit = options.vae_precision == "int8"
    plans["vae_decoder"] = plan("vae", "vae_decoder", "int8" if eight_bit else vae_precision,
                                floats=vae_precision if eight_bit else None)  # fmt: skip
    # A decoder overflows at its end; which layers of an encoder are safe in fp16 is unknown.
    plans["vae_encoder"] = plan("vae", "vae_encoder", "fp32" if vae_precision == "mixed" else vae_precision)
    if _wants_twins(vae_precision, options):
        plans["vae_decoder_bf16"] = plan("vae", "vae_decoder", "bf16")
        plans["vae_encoder_bf16"] = plan("vae", "vae_encoder", "bf16")
    if TINY in models:
        _check_tiny(models["vae"], models[TINY], pipeline.models[TINY].where)
        plans[TINY] = plan(TINY, "vae_decoder", options.floats)
    for each in plans.values():  # raises for models without a graph before anything is exported
        make_graph(each.kind, each.model, time_ids=each.time_ids, pooled=each.pooled, tokens=each.tokens,
                   where=each.source.where)  # fmt: skip
    return StagePlan(pipeline, models, tokenizers, pooled_role), plans


def time_id_names(pipeline: PipelineSource) -> tuple[str, ...]:
    """Return the names of the time ids in order: six sizes, or four and the aesthetic score."""
    sizes = ("original_height", "original_width", "crop_top", "crop_left")
    last = ("aesthetic_score",) if pipeline.requires_aesthetics_score else ("target_height", "target_width")
    return sizes + last


def _check_widths(models: dict[str, MetaModel], pipeline: PipelineSource, *, inpaints: bool) -> None:
    """Raise SourceError unless encoders, UNet and autoencoder fit each other.

    If `inpaints`, the UNet may receive a mask and the masked picture's latents behind the latents.
    """
    unet = models["unet"].config
    latents = models["vae"].config["latent_channels"]
    if unet["in_channels"] != latents and not (inpaints and unet["in_channels"] == 2 * latents + 1):
        raise SourceError(
            f"{pipeline.root}/unet: takes {unet['in_channels']} channels, but the autoencoder makes {latents}; give a"
            f" base of {latents} channels, or of {2 * latents + 1} for inpainting, and a refiner of {latents}"
        )
    widths = [model.config["hidden_size"] for name, model in models.items() if name.startswith("text_")]
    if context_width(unet) != sum(widths):
        raise SourceError(
            f"{pipeline.root}/unet: takes a context of width {context_width(unet)}, but the text encoders make"
            f" {' + '.join(map(str, widths))}; the folder mixes two models"
        )


def _check_tiny(vae: MetaModel, tiny: MetaModel, where: str) -> None:
    """Raise SourceError unless a tiny autoencoder decodes latents of the number and size of the other's."""
    ours, its = ((model.config["latent_channels"], vae_factor(model.config)) for model in (vae, tiny))
    if ours != its:
        raise SourceError(f"--tiny-vae {where}: its latents have {its[0]} channels, of {its[1]} pixels each, and the"
                          f" model's {ours[0]}, of {ours[1]}; give the tiny autoencoder of this model")  # fmt: skip


def _vae_precision(model: MetaModel, options: Options) -> Precision:
    """Return the precision of an autoencoder, and of what is not in 8 bits if its decoder is to be."""
    if options.vae_precision in _VAE_PRECISIONS:
        return _VAE_PRECISIONS[options.vae_precision]
    # The published autoencoder overflows fp16 and sets force_upcast; a repaired one sets it to false.
    return "fp32" if model.config.get("force_upcast", True) else options.floats


def _wants_twins(vae_precision: Precision, options: Options) -> bool:
    """Return whether TensorRT should get a bf16 autoencoder: bf16 has the range of fp32 and half its size."""
    return options.twins and options.vae_precision == "auto" and vae_precision == "fp32" and options.precision != "fp32"


def _same(one: ComponentPlan, other: ComponentPlan) -> bool:
    names = one.tensor_names()
    if one.kind == "unet" or one.function() != other.function() or names != other.tensor_names():
        return False
    left, right = one.checkpoint.tensors, other.checkpoint.tensors
    if any((left[n].dtype, left[n].shape) != (right[n].dtype, right[n].shape) for n in names):
        return False
    return one.digest == other.digest
