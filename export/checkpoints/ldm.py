"""Names of LDM checkpoints (the layout of sgm's single files) for the modules of diffusers and transformers."""

__all__ = ["controlnet_prefixes", "open_clip_prefixes", "unet_prefixes", "vae_prefixes"]

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2",
}  # fmt: skip
_UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
}  # fmt: skip
_BLOCK = (
    *(f"{attention}.{part}" for attention in ("attn1", "attn2") for part in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3",
)  # fmt: skip
_VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
_VAE_MIDDLE = {
    **{f"mid.block_{i + 1}.{part}": f"mid_block.resnets.{i}.{part}" for i in (0, 1) for part in list(_VAE_RESNET)[:4]},
    **{f"mid.attn_1.{part}": f"mid_block.attentions.0.to_{part}" for part in "qkv"},
    "mid.attn_1.norm": "mid_block.attentions.0.group_norm", "mid.attn_1.proj_out": "mid_block.attentions.0.to_out.0",
    "conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out",
}  # fmt: skip
_CLIP_LAYER = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    "attn": "self_attn", "attn.out_proj": "self_attn.out_proj",
}  # fmt: skip


def unet_prefixes(config: Mapping[str, Any]) -> dict[str, str]:
    """Return {LDM module: diffusers module} for every module with parameters of a UNet2DConditionModel `config`.

    Both sides are complete leaf names, without ``.weight`` and ``.bias``: ``input_blocks.4.0.in_layers.0`` is
    ``down_blocks.1.resnets.0.norm1``, ``input_blocks.4.1.transformer_blocks.0.attn1.to_q`` is
    ``down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q``. `config` must hold the block types, the channels
    and the counts; any UNet of SDXL's outline will do. Source: sgm's ``UNetModel`` numbers its blocks in order of
    construction; a downsampler gets a number of its own, an upsampler is the end of its level's last block.
    """
    return dict(_UNET_ENDS) | dict(_down(config)) | dict(_middle(config)) | dict(_up(config))


def controlnet_prefixes(config: Mapping[str, Any]) -> dict[str, str]:
    """Return {LDM module: diffusers module} for a ControlNet of the UNet2DConditionModel with this `config`.

    Source: ControlNet's ``ControlNet`` class, which numbers the down blocks as the UNet does, has a convolution of its
    own for each, and one for the middle block; its ``input_hint_block`` has an activation after each convolution.
    """
    names = {theirs: ours for theirs, ours in _UNET_ENDS.items() if not theirs.startswith("out.")}
    down = dict(_down(config))
    count = 1 + max((int(theirs.split(".")[1]) for theirs in down), default=0)
    names |= down | dict(_middle(config)) | {"middle_block_out.0": "controlnet_mid_block"}
    names |= {f"zero_convs.{index}.0": f"controlnet_down_blocks.{index}" for index in range(count)}
    places = {0: "conv_in", **{2 * block + 2: f"blocks.{block}" for block in range(6)}, 14: "conv_out"}
    return names | {f"input_hint_block.{place}": f"controlnet_cond_embedding.{ours}" for place, ours in places.items()}


def vae_prefixes(config: Mapping[str, Any]) -> dict[str, str]:
    """Return {LDM module: diffusers module} for every module with parameters of an AutoencoderKL `config`.

    A shortcut is listed for every residual block, though only blocks that change the channels have one. Source:
    CompVis' ``Encoder`` and ``Decoder``, which number the decoder's levels from the finest, diffusers from the
    coarsest.
    """
    levels, layers = len(config["block_out_channels"]), int(config.get("layers_per_block", 1))
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        names |= {f"{half}.{theirs}": f"{half}.{ours}" for theirs, ours in _VAE_MIDDLE.items()}
    for level in range(levels):
        mirror = levels - 1 - level
        names[f"encoder.down.{level}.downsample.conv"] = f"encoder.down_blocks.{level}.downsamplers.0.conv"
        names[f"decoder.up.{mirror}.upsample.conv"] = f"decoder.up_blocks.{level}.upsamplers.0.conv"
        for theirs, ours in _VAE_RESNET.items():
            for block in range(layers):
                names[f"encoder.down.{level}.block.{block}.{theirs}"] = (
                    f"encoder.down_blocks.{level}.resnets.{block}.{ours}"
                )
            for block in range(layers + 1):
                names[f"decoder.up.{mirror}.block.{block}.{theirs}"] = (
                    f"decoder.up_blocks.{level}.resnets.{block}.{ours}"
                )
    return names


def open_clip_prefixes(config: Mapping[str, Any]) -> dict[str, str]:
    """Return {OpenCLIP module: transformers module} of a CLIPTextModelWithProjection `config`.

    The attention's own parameters (``attn.in_proj_weight`` and ``_bias``) hold the rows of query, key and value, which
    the caller must split. Source: open_clip's ``TextTransformer``.
    """
    names = {"token_embedding": "text_model.embeddings.token_embedding", "ln_final": "text_model.final_layer_norm"}
    for layer in range(int(config.get("num_hidden_layers", 12))):
        for theirs, ours in _CLIP_LAYER.items():
            names[f"transformer.resblocks.{layer}.{theirs}"] = f"text_model.encoder.layers.{layer}.{ours}"
    return names


def _down(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    types, channels = config["down_block_types"], config["block_out_channels"]
    layers = _per_level(config.get("layers_per_block", 2), len(types))
    depths = _per_level(config.get("transformer_layers_per_block", 1), len(types))
    number = 1
    for level, kind in enumerate(types):
        here = f"down_blocks.{level}"
        for layer, depth in enumerate(_per_level(depths[level], layers[level])):
            widens = layer == 0 and channels[level] != channels[max(level - 1, 0)]
            yield from _resnet(f"input_blocks.{number}.0", f"{here}.resnets.{layer}", shortcut=widens)
            if "CrossAttn" in kind:
                yield from _attention(f"input_blocks.{number}.1", f"{here}.attentions.{layer}", depth)
            number += 1
        if level < len(types) - 1:
            yield f"input_blocks.{number}.0.op", f"{here}.downsamplers.0.conv"
            number += 1


def _middle(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    kind = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    if kind is None:
        return
    yield from _resnet("middle_block.0", "mid_block.resnets.0")
    if "CrossAttn" in kind:
        depths = _per_level(config.get("transformer_layers_per_block", 1), len(config["down_block_types"]))
        yield from _attention("middle_block.1", "mid_block.attentions.0", _per_level(depths[-1], 1)[0])
        yield from _resnet("middle_block.2", "mid_block.resnets.1")


def _up(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    types = config["up_block_types"]
    layers = [count + 1 for count in reversed(_per_level(config.get("layers_per_block", 2), len(types)))]
    depths = config.get("reverse_transformer_layers_per_block")
    if depths is None:
        depths = _per_level(config.get("transformer_layers_per_block", 1), len(types))[::-1]
    number = 0
    for level, kind in enumerate(types):
        here = f"up_blocks.{level}"
        for layer, depth in enumerate(_per_level(depths[level], layers[level])):
            # The skip connection is concatenated, so the channels always change.
            yield from _resnet(f"output_blocks.{number}.0", f"{here}.resnets.{layer}", shortcut=True)
            if "CrossAttn" in kind:
                yield from _attention(f"output_blocks.{number}.1", f"{here}.attentions.{layer}", depth)
            number += 1
        if level < len(types) - 1:
            place = 2 if "CrossAttn" in kind else 1
            yield f"output_blocks.{number - 1}.{place}.conv", f"{here}.upsamplers.0.conv"


def _resnet(theirs: str, ours: str, *, shortcut: bool = False) -> Iterator[tuple[str, str]]:
    for inner, name in _RESNET.items():
        yield f"{theirs}.{inner}", f"{ours}.{name}"
    if shortcut:
        yield f"{theirs}.skip_connection", f"{ours}.conv_shortcut"


def _attention(theirs: str, ours: str, depth: int) -> Iterator[tuple[str, str]]:
    # Transformer blocks have the same names on both sides.
    leaves = ["norm", "proj_in", "proj_out"]
    leaves += [f"transformer_blocks.{block}.{leaf}" for block in range(depth) for leaf in _BLOCK]
    for leaf in leaves:
        yield f"{theirs}.{leaf}", f"{ours}.{leaf}"


def _per_level(value: Any, count: int) -> Sequence[Any]:
    """Return a config's setting, a list or one number for all, as `count` values."""
    return [value] * count if isinstance(value, int) else value
