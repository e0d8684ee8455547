"""Small SDXL-shaped pairs as diffusers folders."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORDS = ["a", "red", "fox", "in", "the", "snow", "blue", "star", "blurry"]


@dataclass(frozen=True)
class Shape:
    """The differences between the pairs of the tests."""

    base: dict[str, Any]
    refiner: dict[str, Any]
    vae_channels: tuple[int, ...] = (16, 32)
    widths: tuple[int, int] = (32, 48)
    eos_token_id: int = 2
    prefix: bool = True
    legacy_vae: bool = False
    own_refiner_parts: bool = False
    force_zeros: tuple[bool, bool] = (True, False)
    aesthetics: bool = True
    scheduler: dict[str, Any] = field(default_factory=dict)


SHAPES = {
    # SDXL's structure: three and four levels, heads per block, encoders stored with transformers < 5's prefix.
    "outline": Shape(
        base={
            "block_out_channels": (16, 32, 32), "attention_head_dim": (1, 2, 4),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 1, 2), "layers_per_block": 1,
        },
        refiner={
            "block_out_channels": (16, 32, 32, 32), "attention_head_dim": (2, 2, 4, 4),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": 1, "layers_per_block": 1,
        },
    ),
    # Two levels, one head width, convolutional projections; the refiner shares nothing with the base.
    "apart": Shape(
        base={
            "block_out_channels": (16, 32), "attention_head_dim": 2,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": (2, 1), "use_linear_projection": False,
        },
        refiner={
            "block_out_channels": (16, 24, 32), "attention_head_dim": (2, 3, 4), "norm_num_groups": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 1,
            "transformer_layers_per_block": (2, 1, 1),
        },
        eos_token_id=0, prefix=False, own_refiner_parts=True, force_zeros=(False, True), vae_channels=(8, 16, 16),
    ),
    # Older files: attention names of the first autoencoders; a refiner without aesthetics; other schedules.
    "legacy": Shape(
        base={
            "block_out_channels": (16, 32), "attention_head_dim": (2, 4), "act_fn": "gelu",
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "layers_per_block": 1, "upcast_attention": True,
        },
        refiner={
            "block_out_channels": (32, 32), "attention_head_dim": (4, 2),
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 1,
        },
        legacy_vae=True, aesthetics=False, vae_channels=(8, 16),
        scheduler={"timestep_spacing": "trailing", "prediction_type": "v_prediction", "beta_schedule": "linear"},
    ),
}  # fmt: skip


def _write_tokenizer(folder: Path, pad: str) -> int:
    """Write a small CLIP tokenizer (bytes and a few words) and return the id of its end token."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    symbols = [chr(byte) for byte in visible] + [chr(256 + i) for i in range(len(hidden))]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            if (parts[0], parts[1]) not in merges:
                merges.append((parts[0], parts[1]))
            parts = [parts[0] + parts[1], *parts[2:]]
    vocabulary = symbols + [symbol + "</w>" for symbol in symbols] + ["".join(pair) for pair in merges]
    vocabulary = [*dict.fromkeys(vocabulary), "<|startoftext|>", "<|endoftext|>"]
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = pad
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(vocabulary) - 1


def _rename_keys(file: Path, rename: Callable[[str], str]) -> None:
    from safetensors.torch import load_file, save_file

    save_file({rename(name): tensor.clone() for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def _legacy_attention(name: str) -> str:
    for new, old in (
        (".to_q.", ".query."),
        (".to_k.", ".key."),
        (".to_v.", ".value."),
        (".to_out.0.", ".proj_attn."),
    ):
        name = name.replace(new, old)
    return name


def _save_encoder(folder: Path, cls: Any, width: int, eos: int, seed: int, *, prefix: bool) -> None:
    import torch
    from transformers import CLIPTextConfig

    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=eos + 1 if eos > 2 else 600, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=77, projection_dim=width, eos_token_id=eos, bos_token_id=0,
        hidden_act="quick_gelu" if cls.__name__ == "CLIPTextModel" else "gelu",
    )  # fmt: skip
    cls(config).save_pretrained(folder)
    stored = folder / "model.safetensors"
    _rename_keys(stored, lambda name: name.removeprefix("text_model."))
    if prefix:
        bare = "text_projection.weight"
        _rename_keys(stored, lambda name: name if name == bare else f"text_model.{name}")


def _save_vae(folder: Path, channels: tuple[int, ...], seed: int, *, legacy: bool, scaling: float = 0.13025) -> None:
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=channels, down_block_types=("DownEncoderBlock2D",) * len(channels), norm_num_groups=8,
        up_block_types=("UpDecoderBlock2D",) * len(channels), layers_per_block=1, latent_channels=4,
        sample_size=64, scaling_factor=scaling,
    )  # fmt: skip
    vae.save_pretrained(folder)
    if legacy:
        _rename_keys(folder / "diffusion_pytorch_model.safetensors", _legacy_attention)


def _save_unet(folder: Path, shape: dict[str, Any], context: int, pooled: int, ids: int, seed: int) -> None:
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    settings = {
        "sample_size": 16, "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "norm_num_groups": 8,
        "use_linear_projection": True, "cross_attention_dim": context,
        "projection_class_embeddings_input_dim": pooled + 8 * ids,
    }  # fmt: skip
    UNet2DConditionModel(**(settings | shape)).save_pretrained(folder)


def make_pair(folder: Path, shape: Shape) -> None:
    """Write `base/` and `refiner/` of `shape` as diffusers folders."""
    from diffusers import EulerDiscreteScheduler
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    for stage in ("base", "refiner"):
        root, refiner = folder / stage, stage == "refiner"
        own = refiner and shape.own_refiner_parts
        seed = 100 if own else 0
        index: dict[str, Any] = {
            "_class_name": "StableDiffusionXLImg2ImgPipeline" if refiner else "StableDiffusionXLPipeline",
            "_diffusers_version": "0.39.0",
            "force_zeros_for_empty_prompt": shape.force_zeros[refiner],
            "scheduler": ["diffusers", "EulerDiscreteScheduler"], "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"], "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "text_encoder": [None, None] if refiner else ["transformers", "CLIPTextModel"],
            "tokenizer": [None, None] if refiner else ["transformers", "CLIPTokenizer"],
        }  # fmt: skip
        if refiner:
            index["requires_aesthetics_score"] = shape.aesthetics
        end = _write_tokenizer(root / "tokenizer_2", pad="!")
        eos = 2 if shape.eos_token_id == 2 else end
        widths = (shape.widths[0], shape.widths[1] + 16 * own)
        _save_encoder(
            root / "text_encoder_2",
            CLIPTextModelWithProjection,
            widths[1],
            eos,
            2 + seed,
            prefix=shape.prefix,
        )
        if not refiner:
            _write_tokenizer(root / "tokenizer", pad="<|endoftext|>")
            _save_encoder(root / "text_encoder", CLIPTextModel, widths[0], eos, 1, prefix=shape.prefix)
        _save_vae(
            root / "vae",
            shape.vae_channels,
            3 + seed,
            legacy=shape.legacy_vae,
            scaling=0.2 if own else 0.13025,
        )
        ids = 5 if refiner and shape.aesthetics else 6
        context = widths[1] if refiner else sum(widths)
        _save_unet(root / "unet", shape.refiner if refiner else shape.base, context, widths[1], ids, 4 + refiner)
        settings = {
            "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
            "timestep_spacing": "leading", "steps_offset": 1,
        }  # fmt: skip
        EulerDiscreteScheduler(**(settings | shape.scheduler)).save_pretrained(root / "scheduler")
        (root / "model_index.json").write_text(json.dumps(index))
