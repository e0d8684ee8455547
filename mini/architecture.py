"""The architecture of the pair: the config.json of every part, as diffusers and transformers read it."""

__all__ = [
    "ADDITION_TIME_DIM",
    "REFINER_STEPS",
    "TOKENS",
    "TRAINING_STEPS",
    "VOCABULARY_SIZE",
    "Config",
    "base_unet",
    "refiner_unet",
    "scheduler",
    "text_encoder",
    "text_encoder_2",
    "tiny_encoder_shapes",
    "tiny_vae",
    "vae",
]

from typing import Any

from sdxl_trt.mini.scenes import SIDE

Config = dict[str, Any]

VOCABULARY_SIZE = 49408
TOKENS = 77
TRAINING_STEPS = 1000
REFINER_STEPS = 200
"""The refiner is trained on timesteps 0..199 only: the lowest fifth of the noise levels, as in SDXL's paper."""

LATENT_CHANNELS = 4
LATENT_SIDE = SIDE // 8


def vae(scaling_factor: float) -> Config:
    """AutoencoderKL: 128x128 RGB to 4x16x16 latents. `scaling_factor` is 1 / standard deviation of the latents."""
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.39.0",
        "act_fn": "silu",
        "block_out_channels": [16, 32, 64, 128],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "force_upcast": False,
        "in_channels": 3,
        "latent_channels": LATENT_CHANNELS,
        "layers_per_block": 1,
        # Groups of many channels: normalising few channels of a flat picture would erase its colour.
        "norm_num_groups": 2,
        "out_channels": 3,
        "sample_size": SIDE,
        "scaling_factor": scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }


def tiny_vae() -> Config:
    """AutoencoderTiny: its decoder takes scaled latents. Its encoder is the smallest that the class can have."""
    return {
        "_class_name": "AutoencoderTiny",
        "_diffusers_version": "0.39.0",
        "act_fn": "relu",
        "decoder_block_out_channels": [16] * 4,
        "encoder_block_out_channels": [1] * 4,
        "force_upcast": False,
        "in_channels": 3,
        "latent_channels": LATENT_CHANNELS,
        "num_decoder_blocks": [3, 3, 2, 1],
        "num_encoder_blocks": [0] * 4,
        "out_channels": 3,
        "scaling_factor": 1.0,
        "upsample_fn": "nearest",
        "upsampling_scaling_factor": 2,
    }


def tiny_encoder_shapes() -> dict[str, tuple[int, ...]]:
    """The shapes of the encoder's tensors, by name: a convolution into one channel, three that halve, one out of it."""
    inner = {f"encoder.layers.{i}.weight": (1, 1, 3, 3) for i in (1, 2, 3)}
    first = {"encoder.layers.0.weight": (1, 3, 3, 3), "encoder.layers.0.bias": (1,)}
    last = {"encoder.layers.4.weight": (LATENT_CHANNELS, 1, 3, 3), "encoder.layers.4.bias": (LATENT_CHANNELS,)}
    return first | inner | last


def text_encoder(vocabulary_size: int = VOCABULARY_SIZE) -> Config:
    """The first text encoder, CLIPTextModel with quick GELU."""
    return _clip("CLIPTextModel", 48, 3, "quick_gelu", vocabulary_size)


def text_encoder_2(vocabulary_size: int = VOCABULARY_SIZE) -> Config:
    """The second text encoder, CLIPTextModelWithProjection with GELU: the only one that the refiner uses."""
    return _clip("CLIPTextModelWithProjection", 64, 4, "gelu", vocabulary_size)


def _clip(kind: str, width: int, layers: int, activation: str, vocabulary_size: int) -> Config:
    return {
        "architectures": [kind],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        # SDXL publishes 2, which makes transformers pool at the token with the largest id.
        "eos_token_id": 2,
        "hidden_act": activation,
        "hidden_size": width,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 4 * width,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": TOKENS,
        "model_type": "clip_text_model",
        "num_attention_heads": width // 16,
        "num_hidden_layers": layers,
        "pad_token_id": 1,
        "projection_dim": width,
        # transformers 5 loads in this dtype by default; UNets default to float32.
        "torch_dtype": "float32",
        "vocab_size": vocabulary_size,
    }


def base_unet() -> Config:
    """The base: three levels, both encoders' states concatenated (48 + 64), six time ids."""
    return _unet(
        attention_head_dim=[3, 6, 9],
        block_out_channels=[48, 96, 144],
        cross_attention_dim=112,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        layers_per_block=1,
        projection_class_embeddings_input_dim=64 + 6 * ADDITION_TIME_DIM,
        transformer_layers_per_block=[1, 1, 2],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    )


def refiner_unet() -> Config:
    """The refiner: four levels, wider at the top, only the second encoder, five time ids."""
    return _unet(
        attention_head_dim=[4, 6, 6, 6],
        block_out_channels=[64, 96, 96, 96],
        cross_attention_dim=64,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        layers_per_block=1,
        projection_class_embeddings_input_dim=64 + 5 * ADDITION_TIME_DIM,
        transformer_layers_per_block=[1, 1, 1, 1],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    )


ADDITION_TIME_DIM = 32
"""Width of one time id's sinusoidal embedding (SDXL: 256)."""


def _unet(**parts: Any) -> Config:
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.39.0",
        "act_fn": "silu",
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": ADDITION_TIME_DIM,
        "center_input_sample": False,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": LATENT_CHANNELS,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": 1e-05,
        "norm_num_groups": 8,
        "out_channels": LATENT_CHANNELS,
        "sample_size": LATENT_SIDE,
        "use_linear_projection": True,
        **parts,
    }


def scheduler() -> Config:
    """SDXL's noise schedule and Euler sampler, unchanged."""
    return {
        "_class_name": "EulerDiscreteScheduler",
        "_diffusers_version": "0.39.0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "interpolation_type": "linear",
        "num_train_timesteps": TRAINING_STEPS,
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "trained_betas": None,
        "use_karras_sigmas": False,
    }
