"""One flat signature per graph: names, dtypes, dynamic axes, and a module with that signature.

The names are diffusers' own; the first axis of a UNet is *rows* (pictures × 1 or 2 for guidance). ``timestep``,
``text_embeds`` and ``time_ids`` are fp32 in every precision: fp16 timesteps are wrong above 512 on fractional
schedules, and the sinusoidal embeddings are computed from them in fp32 inside the graph.
"""

__all__ = [
    "Axis",
    "Graph",
    "Input",
    "Output",
    "context_width",
    "make_graph",
    "residual_names",
    "residual_shapes",
    "vae_factor",
]

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from sdxl_trt.engines import SourceError
from sdxl_trt.engines.plans import TOKENS
from sdxl_trt.export.graph.models import MetaModel

# diffusers' upsampling makes a copy, without effect, for 64 rows or more: the trace must stay on one side of that
# branch, the graph is valid for any number.
MAX_TRACED_ROWS = 63


@dataclass(frozen=True)
class Axis:
    """A dynamic axis, a multiple of `multiple`; `example` is its size while tracing.

    Axes of one name with other multiples are multiples of one size.
    """

    name: str
    example: int
    multiple: int = 1
    traced_max: int | None = None
    label: str = ""
    """Its name in the graph, if that is not `name`: a multiple of that axis, such as "8*height"."""


@dataclass(frozen=True)
class Input:
    """One input of a graph; `dtype` None means the precision of the graph."""

    name: str
    shape: tuple[int | Axis, ...]
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Output:
    """One output of a graph, in the precision of the graph; dynamic dimensions have names."""

    name: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Graph:
    """A traceable module with its signature. Parameter names are the model's with `prefix` before them."""

    kind: str
    module: torch.nn.Module
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    prefix: str = "model."


def make_graph(
    kind: str, model: MetaModel, *, time_ids: int = 0, pooled: int = 0, tokens: int = TOKENS, where: str = ""
) -> Graph:
    """Return `model` wrapped for the graph `kind`: text_encoder, unet, controlnet, vae_decoder or vae_encoder.

    The signature of a UNet or ControlNet depends on its pipeline: the number of `time_ids` and the width of the
    `pooled` prompt; a text encoder's on its tokenizer, which cuts and pads a prompt to `tokens` ids. Raises SourceError
    if these do not fit the model's config.
    """
    if kind == "unet":
        return _unet_graph(model, time_ids, pooled, where)
    if kind == "controlnet":
        return _controlnet_graph(model, time_ids, pooled, where)
    if kind == "text_encoder":
        return _text_encoder_graph(model, tokens, where)
    return _vae_decoder_graph(model) if kind == "vae_decoder" else _vae_encoder_graph(model)


class _UNet(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        time_ids: Tensor,
    ) -> Tensor:
        conditions = {"text_embeds": text_embeds, "time_ids": time_ids}
        output = self.model(sample, timestep, encoder_hidden_states, added_cond_kwargs=conditions, return_dict=False)
        return cast("Tensor", output[0])


class _ControlNet(torch.nn.Module):
    """Returns every residual, scaled for each row: those of the down blocks, and the middle block's last.

    The residuals of an earlier ControlNet are added, so that several run one after the other, and their sum never
    leaves the device; without an earlier one they are zeros of one row and one pixel.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        time_ids: Tensor,
        controlnet_cond: Tensor,
        scales: Tensor,
    ) -> tuple[Tensor, ...]:
        conditions = {"text_embeds": text_embeds, "time_ids": time_ids}
        down, middle = self.model(
            sample, timestep, encoder_hidden_states, controlnet_cond, added_cond_kwargs=conditions, return_dict=False
        )
        columns = scales.to(sample.dtype)[:, :, None, None, None].unbind(1)
        return tuple(residual * column for residual, column in zip((*down, middle), columns, strict=True))


class _TextEncoder(torch.nn.Module):
    """Returns every hidden state (clip skip needs them) and, if the encoder projects, the pooled text_embeds.

    A token whose `embedding_index` is i > 0 has row i - 1 of `embeddings` in place of the table's row of its id, which
    still decides where the prompt is pooled. The table stays one weight: ids never exceed it.
    """

    def __init__(self, model: Any, *, projects: bool) -> None:
        super().__init__()
        self.model = model
        self.projects = projects

    def forward(self, input_ids: Tensor, embedding_index: Tensor, embeddings: Tensor) -> tuple[Tensor, ...]:
        def replace(_module: torch.nn.Module, _inputs: Any, tokens: Tensor) -> Tensor:
            vectors = torch.nn.functional.embedding((embedding_index - 1).clamp(min=0), embeddings)
            return torch.where((embedding_index > 0).unsqueeze(-1), vectors, tokens)

        # transformers' CLIP takes ids only: the vectors enter behind its table of tokens.
        hook = self.model.get_input_embeddings().register_forward_hook(replace)
        try:
            output = self.model(input_ids, output_hidden_states=True)
        finally:
            hook.remove()
        return (*output.hidden_states, output.text_embeds) if self.projects else tuple(output.hidden_states)


class _VaeDecoder(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, latent_sample: Tensor) -> Tensor:
        return cast("Tensor", self.model.decode(latent_sample, return_dict=False)[0])


class _VaeEncoder(torch.nn.Module):
    """Returns the moments of the posterior; the host samples from it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor) -> Tensor:
        return cast("Tensor", self.model.encode(sample).latent_dist.parameters)


def _unet_graph(model: MetaModel, time_ids: int, pooled: int, where: str) -> Graph:
    config = model.config
    _check_text_time(config, time_ids, pooled, where)
    multiple = 2 ** cast("int", model.module.num_upsamplers)
    rows, tokens = Axis("rows", 2, traced_max=MAX_TRACED_ROWS), Axis("tokens", 2 * TOKENS)
    height, width = Axis("height", 2 * multiple, multiple), Axis("width", 3 * multiple, multiple)
    inputs = (
        Input("sample", (rows, config["in_channels"], height, width)),
        Input("timestep", (rows,), torch.float32),
        Input("encoder_hidden_states", (rows, tokens, context_width(config))),
        Input("text_embeds", (rows, pooled), torch.float32),
        Input("time_ids", (rows, time_ids), torch.float32),
    )
    outputs = (Output("out_sample", ("rows", config["out_channels"], "height", "width")),)
    return Graph("unet", _UNet(model.module), inputs, outputs)


def residual_names(count: int) -> tuple[str, ...]:
    """Return the names of the `count` residuals of a ControlNet in their order: the middle block's is the last."""
    return (*(f"down_residual.{index}" for index in range(count - 1)), "mid_residual")


def residual_shapes(config: Any) -> tuple[tuple[int, int], ...]:
    """Return (channels, divisor of the latents' sides) of every residual that a UNet with this config takes.

    They are in the order of `residual_names`: the skip connections from the finest level on, then the middle block.
    """
    widths = [int(width) for width in config["block_out_channels"]]
    layers = config["layers_per_block"]
    counts = [layers] * len(widths) if isinstance(layers, int) else list(layers)
    shapes = [(widths[0], 1)]
    for level, (width, count) in enumerate(zip(widths, counts, strict=True)):
        last = level == len(widths) - 1
        shapes += [(width, 2**level)] * count + ([] if last else [(width, 2 ** (level + 1))])
    return (*shapes, (widths[-1], 2 ** (len(widths) - 1)))


def _controlnet_graph(model: MetaModel, time_ids: int, pooled: int, where: str) -> Graph:
    config = model.config
    _check_text_time(config, time_ids, pooled, where)
    sides = 2 ** (len(config["conditioning_embedding_out_channels"]) - 1)
    multiple = 2 ** (len(config["block_out_channels"]) - 1)
    rows, tokens = Axis("rows", 2, traced_max=MAX_TRACED_ROWS), Axis("tokens", 2 * TOKENS)
    height, width = Axis("height", 2 * multiple, multiple), Axis("width", 3 * multiple, multiple)
    picture = tuple(replace(axis, label=f"{sides}*{axis.name}", example=sides * axis.example, multiple=sides * multiple)
                    for axis in (height, width))  # fmt: skip
    shapes = residual_shapes(config)
    inputs = (
        Input("sample", (rows, config["in_channels"], height, width)),
        Input("timestep", (rows,), torch.float32),
        Input("encoder_hidden_states", (rows, tokens, context_width(config))),
        Input("text_embeds", (rows, pooled), torch.float32),
        Input("time_ids", (rows, time_ids), torch.float32),
        Input("controlnet_cond", (rows, config["conditioning_channels"], *picture)),
        Input("scales", (rows, len(shapes)), torch.float32),
    )
    outputs = tuple(
        Output(name, ("rows", channels, _over("height", divisor), _over("width", divisor)))
        for name, (channels, divisor) in zip(residual_names(len(shapes)), shapes, strict=True)
    )
    return Graph("controlnet", _ControlNet(model.module), inputs, outputs)


def _over(axis: str, divisor: int) -> str:
    return axis if divisor == 1 else f"{axis}/{divisor}"


def context_width(config: Any) -> int:
    """Return the width of encoder_hidden_states for a UNet with this config."""
    width = config["encoder_hid_dim"] or config["cross_attention_dim"]
    return int(width if isinstance(width, int) else width[0])


def _check_text_time(config: Any, time_ids: int, pooled: int, where: str) -> None:
    if config["addition_embed_type"] != "text_time":
        raise SourceError(f"{where}: addition_embed_type is {config['addition_embed_type']!r}, but SDXL's UNets have"
                          " 'text_time'; this is not an SDXL model")  # fmt: skip
    expected = config["projection_class_embeddings_input_dim"]
    extras = [name for name in ("time_cond_proj_dim", "class_embed_type", "num_class_embeds") if config.get(name)]
    if extras:
        raise SourceError(f"{where}: needs inputs that SDXL's pipelines lack ({', '.join(extras)}), like distilled"
                          " consistency models; not supported")  # fmt: skip
    made = time_ids * config["addition_time_embed_dim"] + pooled
    if made != expected:
        raise SourceError(
            f"{where}: the UNet's added conditions have width {expected}, but {time_ids} time ids of"
            f" {config['addition_time_embed_dim']} and a pooled prompt of {pooled} make {made};"
            " check requires_aesthetics_score in model_index.json and the second text encoder"
        )


def _text_encoder_graph(model: MetaModel, tokens: int, where: str) -> Graph:
    config = model.config
    if config["max_position_embeddings"] < tokens:
        raise SourceError(
            f"{where}: has {config['max_position_embeddings']} positions, but its tokenizer makes {tokens} ids per"
            " prompt; give the tokenizer that belongs to this encoder"
        )
    projects = "text_projection.weight" in model.state
    hidden = ("prompts", tokens, config["hidden_size"])
    outputs = [Output(f"hidden_states.{i}", hidden) for i in range(config["num_hidden_layers"] + 1)]
    if projects:
        outputs.append(Output("text_embeds", ("prompts", config["projection_dim"])))
    prompts = Axis("prompts", 2)
    inputs = (
        Input("input_ids", (prompts, tokens), torch.int64),
        Input("embedding_index", (prompts, tokens), torch.int64),
        Input("embeddings", (Axis("vectors", 3), config["hidden_size"])),
    )
    return Graph("text_encoder", _TextEncoder(model.module, projects=projects), inputs, tuple(outputs))


def vae_factor(config: Any) -> int:
    """Return how many image pixels a latent pixel spans along each side."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


def _vae_decoder_graph(model: MetaModel) -> Graph:
    config, factor = model.config, vae_factor(model.config)
    pictures = Axis("pictures", 2, traced_max=MAX_TRACED_ROWS)
    shape = (pictures, config["latent_channels"], Axis("height", 6), Axis("width", 8))
    pixels = ("pictures", config["out_channels"], f"{factor}*height", f"{factor}*width")
    return Graph(
        "vae_decoder",
        _VaeDecoder(model.module),
        (Input("latent_sample", shape),),
        (Output("sample", pixels),),
    )


def _vae_encoder_graph(model: MetaModel) -> Graph:
    config, factor = model.config, vae_factor(model.config)
    height, width = Axis("height", 6 * factor, factor), Axis("width", 8 * factor, factor)
    shape = (Axis("pictures", 2, traced_max=MAX_TRACED_ROWS), config["in_channels"], height, width)
    moments = ("pictures", 2 * config["latent_channels"], f"height/{factor}", f"width/{factor}")
    outputs = (Output("latent_parameters", moments),)
    return Graph("vae_encoder", _VaeEncoder(model.module), (Input("sample", shape),), outputs)
