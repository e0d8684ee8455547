"""Every kind of UNet and autoencoder that diffusers' configs allow, exported, against diffusers' own modules."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from small_models.modules import COMMON, IDS, POOLED, export_module, real_module

pytestmark = pytest.mark.usefixtures("translations_once")
UNETS: dict[str, dict[str, Any]] = {
    "reversed depths and scale shift": {
        "transformer_layers_per_block": ((1,), (2,)), "reverse_transformer_layers_per_block": ((1, 2), (1, 1)),
        "resnet_time_scale_shift": "scale_shift", "act_fn": "mish", "use_linear_projection": True,
    },
    "simple attention and resnet sampling": {
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "attention_head_dim": 4,
    },
    "self attention, one level, no middle": {
        "block_out_channels": (8,), "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",), "mid_block_type": None, "only_cross_attention": (True,),
    },
    "four levels, widths of context apart": {
        "block_out_channels": (8, 8, 12, 16), "attention_head_dim": (1, 2, 3, 4), "layers_per_block": (1, 2, 1, 1),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "flip_sin_to_cos": False, "freq_shift": 1, "time_embedding_act_fn": "silu", "dual_cross_attention": False,
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", UNETS)
def test_unets_of_every_outline(name: str, tmp_path: Path) -> None:
    config = COMMON | UNETS[name]
    module = real_module("UNet2DConditionModel", config)
    path = export_module("unet", "UNet2DConditionModel", config, module, tmp_path, time_ids=IDS, pooled=POOLED)
    session = onnxruntime.InferenceSession(path)
    multiple = 2**module.num_upsamplers
    generator = torch.Generator().manual_seed(1)
    for rows, height, width, tokens in ((1, multiple, 3 * multiple, 77), (3, 4 * multiple, 2 * multiple, 154)):
        feed = {
            "sample": torch.randn(rows, 4, height, width, generator=generator),
            "timestep": torch.linspace(1.5, 999, rows),
            "encoder_hidden_states": torch.randn(rows, tokens, 20, generator=generator),
            "text_embeds": torch.randn(rows, POOLED, generator=generator),
            "time_ids": torch.rand(rows, IDS, generator=generator) * 1024,
        }
        with torch.no_grad():
            conditions = {key: feed[key] for key in ("text_embeds", "time_ids")}
            arguments = (feed["sample"], feed["timestep"], feed["encoder_hidden_states"])
            expected = module(*arguments, added_cond_kwargs=conditions).sample.numpy()
        (found,) = session.run(None, {key: value.numpy() for key, value in feed.items()})
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)


@pytest.mark.slow
def test_autoencoders_without_the_usual_convolutions(tmp_path: Path) -> None:
    config = {
        "block_out_channels": (8, 16, 16), "down_block_types": ("DownEncoderBlock2D",) * 3, "norm_num_groups": 4,
        "up_block_types": ("UpDecoderBlock2D",) * 3, "layers_per_block": 2, "latent_channels": 4,
        "use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False,
    }  # fmt: skip
    module = real_module("AutoencoderKL", config)
    generator = torch.Generator().manual_seed(1)
    for kind, shape in (("vae_decoder", (1, 4, 5, 7)), ("vae_encoder", (3, 3, 20, 28))):
        folder = tmp_path / kind
        folder.mkdir()
        path = export_module(kind, "AutoencoderKL", config, module, folder)
        value = torch.randn(shape, generator=generator)
        with torch.no_grad():
            decoded = kind == "vae_decoder"
            expected = module.decode(value).sample if decoded else module.encode(value).latent_dist.parameters
        session = onnxruntime.InferenceSession(path)
        (found,) = session.run(None, {session.get_inputs()[0].name: value.numpy()})
        np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=5e-5)
