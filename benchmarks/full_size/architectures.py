"""The configs for checkpoints of random weights: SDXL's published ones, and those of smaller cousins."""

__all__ = ["ROLES", "SIZES", "Architecture", "Role", "architecture"]

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Role = Literal["base", "refiner"]
Config = dict[str, Any]
ROLES: tuple[Role, ...] = ("base", "refiner")
_MODELS = ("text_encoder", "text_encoder_2", "unet", "vae")


@dataclass(frozen=True)
class Architecture:
    """The configs of one pipeline folder by model, its index and scheduler, and the folders of its tokenizers."""

    role: Role
    index: Config
    scheduler: Config
    models: dict[str, Config]
    tokenizers: dict[str, Path]

    def class_name(self, model: str) -> str:
        """Return the class of `model` ("unet", ...) as the index names it."""
        return str(self.index[model][1])


@dataclass(frozen=True)
class _Narrow:
    """A cousin of SDXL: the same number of levels, other widths and depths. Heads are by default SDXL's, 64 wide."""

    channels: tuple[int, int, int]
    depths: tuple[int, int, int]
    refiner_depth: int
    text: tuple[int, int]
    text_layers: int = 4
    vae: tuple[int, ...] = (64, 128, 128, 128)
    head: int = 64
    groups: int = 32
    time_dim: int = 256
    layers: int = 2


# The UNets' parameter counts are in the names. Cousins of equal depth differ only in width: same graph structure.
SIZES: dict[str, _Narrow | None] = {
    "sdxl": None,
    "cousin-390m": _Narrow((128, 256, 512), (1, 2, 10), 4, (192, 320)),
    "cousin-1b": _Narrow((320, 640, 1280), (1, 2, 3), 2, (192, 320)),
    "cousin-160m": _Narrow((128, 256, 512), (1, 2, 3), 2, (192, 320)),
    "cousin-50m": _Narrow((64, 128, 256), (1, 2, 4), 2, (128, 128), head=32, time_dim=64),
    # The pair used for ComfyUI's recorded runs (tests/comfyui).
    "h6": _Narrow((64, 128, 128), (1, 1, 2), 4, (64, 128), vae=(128, 256, 512, 512)),
    "tiny": _Narrow((16, 32, 32), (1, 1, 1), 1, (16, 32), 2, (8, 16), head=8, groups=8, time_dim=8, layers=1),
}


def architecture(size: str, role: Role) -> Architecture:
    """Return the configs of `size` for a base or a refiner.

    The published ones are part of the package (``export/published``); a cousin changes their widths and depths.
    """
    from sdxl_trt.export.sources import PUBLISHED  # noqa: PLC0415 - brings the exporter's libraries

    root = PUBLISHED / role
    index = _read(root / "model_index.json")
    present = [model for model in _MODELS if index.get(model, [None])[0]]
    models = {model: _read(root / model / "config.json") for model in present}
    narrow = SIZES[size]
    if narrow is not None:
        models = {model: config | _changes(narrow, model, role) for model, config in models.items()}
    tokenizers = {name: root / name for name in ("tokenizer", "tokenizer_2") if index.get(name, [None])[0]}
    scheduler = _read(root / "scheduler" / "scheduler_config.json")
    return Architecture(role, index, scheduler, models, tokenizers)


def _read(path: Path) -> Config:
    content: Config = json.loads(path.read_bytes())
    return content


def _changes(narrow: _Narrow, model: str, role: Role) -> Config:
    if model == "unet":
        return _unet(narrow, role)
    if model == "vae":
        return _vae(narrow)
    return _text(narrow, narrow.text[model == "text_encoder_2"])


def _unet(narrow: _Narrow, role: Role) -> Config:
    refiner = role == "refiner"
    # The refiner has a fourth level as wide as the third, and takes only the second encoder's states.
    channels = (*narrow.channels, narrow.channels[-1]) if refiner else narrow.channels
    pooled, time_ids = narrow.text[1], 5 if refiner else 6
    return {
        "block_out_channels": list(channels),
        "attention_head_dim": [max(1, width // narrow.head) for width in channels],
        "transformer_layers_per_block": narrow.refiner_depth if refiner else list(narrow.depths),
        "cross_attention_dim": pooled if refiner else sum(narrow.text),
        "addition_time_embed_dim": narrow.time_dim,
        "projection_class_embeddings_input_dim": pooled + time_ids * narrow.time_dim,
        "norm_num_groups": narrow.groups,
        "layers_per_block": narrow.layers,
    }


def _vae(narrow: _Narrow) -> Config:
    levels = len(narrow.vae)
    return {
        "block_out_channels": list(narrow.vae),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": narrow.groups,
        "layers_per_block": narrow.layers,
    }


def _text(narrow: _Narrow, width: int) -> Config:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "projection_dim": width,
        "num_attention_heads": max(1, width // 64),
        "num_hidden_layers": narrow.text_layers,
    }
