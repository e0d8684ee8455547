"""Names of the UNet's modules in LDM checkpoints (the layout of sgm's single files) and in many LoRAs."""

__all__ = ["unet_prefixes"]

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


def unet_prefixes(config: Mapping[str, Any]) -> dict[str, str]:
    """Return {LDM module: diffusers module} for every module with parameters of a UNet2DConditionModel `config`.

    Both sides are complete leaf names, without ``.weight`` and ``.bias``: ``input_blocks.4.0.in_layers.0`` is
    ``down_blocks.1.resnets.0.norm1``, ``input_blocks.4.1.transformer_blocks.0.attn1.to_q`` is
    ``down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q``. `config` must hold the block types, the channels
    and the counts; any UNet of SDXL's outline will do. Source: sgm's ``UNetModel`` numbers its blocks in order of
    construction; a downsampler gets a number of its own, an upsampler is the end of its level's last block.
    """
    return dict(_UNET_ENDS) | dict(_down(config)) | dict(_middle(config)) | dict(_up(config))


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
