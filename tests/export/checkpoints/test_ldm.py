"""LDM's names against diffusers' own converters, and against the modules that diffusers builds."""

import json
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_trt.engines.adapters.unet_names import unet_prefixes
from sdxl_trt.export.checkpoints.ldm import open_clip_prefixes, vae_prefixes
from sdxl_trt.export.graph.models import build_model
from sdxl_trt.export.sources.configs import PUBLISHED

TINY = {
    "sample_size": 8, "addition_embed_type": "text_time", "addition_time_embed_dim": 4, "norm_num_groups": 4,
    "cross_attention_dim": 8, "projection_class_embeddings_input_dim": 32, "attention_head_dim": 4,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
}  # fmt: skip


def _published(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((PUBLISHED / name / "config.json").read_bytes())
    return config


def _leaves(class_name: str, config: dict[str, Any]) -> set[str]:
    return {name.rpartition(".")[0] for name in build_model(class_name, config, "test").state}


def _numbered(prefixes: dict[str, str], stem: str) -> dict[str, torch.Tensor]:
    """Return a checkpoint with LDM names in which every tensor holds a unique number."""
    names = [f"{stem}{module}.{parameter}" for module in prefixes for parameter in ("weight", "bias")]
    return {name: torch.full((1, 1), float(number)) for number, name in enumerate(names)}


def _numbers(prefixes: dict[str, str]) -> dict[str, int]:
    """Return the expected conversion of the checkpoint of `_numbered`."""
    names = [f"{module}.{parameter}" for module in prefixes.values() for parameter in ("weight", "bias")]
    return {name: number for number, name in enumerate(names)}


@pytest.mark.parametrize("role", ["base", "refiner"])
def test_the_unet_is_converted_as_diffusers_converts_it(role: str) -> None:
    config = _published(f"{role}/unet")
    prefixes = unet_prefixes(config)
    theirs = convert_ldm_unet_checkpoint(_numbered(prefixes, "model.diffusion_model."), config)
    assert {name: int(tensor) for name, tensor in theirs.items()} == _numbers(prefixes)


@pytest.mark.parametrize(("role", "tensors", "modules"), [("base", 1680, 1050), ("refiner", 1220, 742)])
def test_every_module_of_the_published_unets_is_named(role: str, tensors: int, modules: int) -> None:
    config = _published(f"{role}/unet")
    assert len(build_model("UNet2DConditionModel", config, "test").state) == tensors
    prefixes = unet_prefixes(config)
    assert len(prefixes) == modules
    assert set(prefixes.values()) == _leaves("UNet2DConditionModel", config)


def test_well_known_names() -> None:
    prefixes = unet_prefixes(_published("base/unet"))
    assert prefixes["input_blocks.4.0.in_layers.0"] == "down_blocks.1.resnets.0.norm1"
    assert prefixes["input_blocks.4.0.skip_connection"] == "down_blocks.1.resnets.0.conv_shortcut"
    assert prefixes["input_blocks.8.1.transformer_blocks.9.attn2.to_out.0"].startswith("down_blocks.2.attentions.1.")
    assert prefixes["middle_block.1.proj_in"] == "mid_block.attentions.0.proj_in"
    assert prefixes["output_blocks.5.2.conv"] == "up_blocks.1.upsamplers.0.conv"
    assert prefixes["label_emb.0.2"] == "add_embedding.linear_2"


@st.composite
def _unets(draw: st.DrawFn) -> dict[str, Any]:
    levels = draw(st.integers(1, 3))
    per_level = st.lists(st.integers(1, 2), min_size=levels, max_size=levels)
    attends = draw(st.lists(st.booleans(), min_size=levels, max_size=levels))
    return TINY | {
        "block_out_channels": draw(st.lists(st.sampled_from([4, 8]), min_size=levels, max_size=levels)),
        "down_block_types": ["CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
        "layers_per_block": draw(st.integers(1, 2) | per_level),
        "transformer_layers_per_block": draw(st.integers(1, 2) | per_level),
        "mid_block_type": draw(st.sampled_from(["UNetMidBlock2DCrossAttn", "UNetMidBlock2D"])),
    }


@settings(deadline=None, max_examples=25)
@given(config=_unets())
def test_every_module_of_any_unet_is_named_once(config: dict[str, Any]) -> None:
    prefixes = unet_prefixes(config)
    assert len(set(prefixes.values())) == len(prefixes)
    assert set(prefixes.values()) == _leaves("UNet2DConditionModel", config)


def test_depths_may_be_listed_layer_by_layer() -> None:
    """Distilled models lack some transformer blocks: their depths are listed layer by layer, and mirrored."""
    config = TINY | {
        "block_out_channels": [4, 8], "layers_per_block": 2,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "transformer_layers_per_block": [1, [1, 2]],
        "reverse_transformer_layers_per_block": [[3, 2, 1], 1], "mid_block_type": None,
    }  # fmt: skip
    assert set(unet_prefixes(config).values()) == _leaves("UNet2DConditionModel", config)


def test_the_autoencoder_is_converted_as_diffusers_converts_it() -> None:
    config = _published("base/vae")
    leaves = _leaves("AutoencoderKL", config)
    prefixes = {theirs: ours for theirs, ours in vae_prefixes(config).items() if ours in leaves}
    assert set(prefixes.values()) == leaves
    theirs = convert_ldm_vae_checkpoint(_numbered(prefixes, "first_stage_model."), config)
    assert {name: int(tensor) for name, tensor in theirs.items()} == _numbers(prefixes)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("channels", [[4], [4, 8], [4, 4, 8, 8]])
def test_every_module_of_any_autoencoder_is_named(layers: int, channels: list[int]) -> None:
    config = {
        "block_out_channels": channels, "layers_per_block": layers, "norm_num_groups": 4, "latent_channels": 4,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
    }  # fmt: skip
    assert _leaves("AutoencoderKL", config) <= set(vae_prefixes(config).values())


def test_every_module_of_the_second_encoder_is_named() -> None:
    config = _published("base/text_encoder_2")
    fused = {f"text_model.encoder.layers.{layer}.self_attn.{part}_proj" for layer in range(32) for part in "qkv"}
    bare = {"text_model.embeddings.position_embedding", "text_projection"}
    named = {ours for ours in open_clip_prefixes(config).values() if not ours.endswith("self_attn")}
    assert named == _leaves("CLIPTextModelWithProjection", config) - fused - bare
