"""Names of LDM checkpoints (the layout of sgm's single files) for the modules of diffusers and transformers."""

__all__ = ["controlnet_prefixes", "open_clip_prefixes", "vae_prefixes"]

from collections.abc import Mapping
from typing import Any

from sdxl_trt.engines.adapters import unet_prefixes

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


def controlnet_prefixes(config: Mapping[str, Any]) -> dict[str, str]:
    """Return {LDM module: diffusers module} for a ControlNet of the UNet2DConditionModel with this `config`.

    Source: ControlNet's ``ControlNet`` class, which numbers the down blocks as the UNet does, has a convolution of its
    own for each, and one for the middle block; its ``input_hint_block`` has an activation after each convolution.
    """
    unet = unet_prefixes(config)
    names = {theirs: ours for theirs, ours in unet.items() if not theirs.startswith(("out.", "output_blocks."))}
    names["middle_block_out.0"] = "controlnet_mid_block"
    count = 1 + max(int(theirs.split(".")[1]) for theirs in names if theirs.startswith("input_blocks."))
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
