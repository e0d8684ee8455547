"""Write the embedded pair as two ordinary diffusers folders, `base/` and `refiner/`, from the embedded bundle.

A third folder, `vae_tiny/`, has the tiny decoder of both, if the pair has one. Needs only numpy and safetensors.
Weights are float16 with the key names that SDXL publishes (CLIP's keys start with `text_model.`).
"""

__all__ = ["TINY", "TOKEN_TABLE", "Parts", "embedded_parts", "materialize", "write_pair", "write_tensors"]

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from sdxl_trt.mini import architecture
from sdxl_trt.mini import clip_vocabulary as vocabulary
from sdxl_trt.mini.embedded import bundle_path
from sdxl_trt.mini.tensors import Tensors, component_names, read_tensors, scaling_factor

TOKEN_TABLE = "text_model.embeddings.token_embedding.weight"  # noqa: S105 (a tensor's name)

TINY = "vae_tiny"
"""The tiny decoder's component in a bundle, and its folder beside the pair's."""

_TEXT_PARTS = {
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
}
_IMAGE_PARTS = {
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


@dataclass(frozen=True)
class Parts:
    """The tensors of a pair's five models, by published name, and the scaling factor of its latents.

    tiny_vae has the tensors of the tiny decoder alone; None: the pair has none.
    """

    base_unet: Tensors
    refiner_unet: Tensors
    text_encoder: Tensors
    text_encoder_2: Tensors
    vae: Tensors
    scaling_factor: float
    tiny_vae: Tensors | None = None


def materialize(directory: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write `base/` and `refiner/` into `directory` and return their paths. Existing files are replaced atomically.

    Beside them is `vae_tiny/`, an AutoencoderTiny that decodes, but cannot encode.

    Raises what `embedded_parts` raises.
    """
    return write_pair(directory, embedded_parts())


def embedded_parts() -> Parts:
    """Return the embedded pair's tensors, read whole, so that the embedded bundle may be replaced afterwards.

    Raises `FileNotFoundError` if the package was installed without its bundle, `ValueError` if it is damaged.
    """
    bundle = bundle_path()
    return Parts(
        read_tensors(bundle, "unet"),
        read_tensors(bundle, "refiner_unet"),
        _first_encoder(bundle),
        read_tensors(bundle, "text_encoder_2"),
        read_tensors(bundle, "vae_encoder", "vae_decoder"),
        scaling_factor(bundle),
        read_tensors(bundle, TINY) if TINY in component_names(bundle) else None,
    )


def _first_encoder(bundle: Path) -> Tensors:
    """Return the first encoder, with the last layer norm that its graph lacks: SDXL does not use its last state.

    Training did not change that norm either, so it is still the identity.
    """
    tensors, norm = read_tensors(bundle, "text_encoder"), "text_model.final_layer_norm"
    width = tensors[TOKEN_TABLE].shape[1:]
    return {f"{norm}.weight": np.ones(width, np.float16), f"{norm}.bias": np.zeros(width, np.float16), **tensors}


def write_pair(directory: str | os.PathLike[str], parts: Parts) -> tuple[Path, Path]:
    """Write `base/` and `refiner/` into `directory` and return their paths. Existing files are replaced atomically.

    `vae_tiny/` is written beside them if the parts have a tiny decoder, else removed.
    """
    base, refiner = Path(directory, "base"), Path(directory, "refiner")
    _write_json(base / "model_index.json", base_index())
    _write_json(refiner / "model_index.json", refiner_index())
    _write_text_side(base, "", parts.text_encoder, architecture.text_encoder())
    for folder in (base, refiner):
        _write_text_side(folder, "_2", parts.text_encoder_2, architecture.text_encoder_2())
        _write_model(folder / "vae", parts.vae, architecture.vae(parts.scaling_factor))
        _write_json(folder / "scheduler/scheduler_config.json", architecture.scheduler())
    _write_model(base / "unet", parts.base_unet, architecture.base_unet())
    _write_model(refiner / "unet", parts.refiner_unet, architecture.refiner_unet())
    if parts.tiny_vae is None:
        shutil.rmtree(base.with_name(TINY), ignore_errors=True)
    else:
        _write_model(base.with_name(TINY), _with_encoder(parts.tiny_vae), architecture.tiny_vae())
    return base, refiner


def _with_encoder(decoder: Tensors) -> Tensors:
    """Return the tensors of a tiny autoencoder: those of its decoder, and an encoder that nobody trained.

    The class has one, so readers expect its tensors. They are NaN: who encodes with them sees that it means nothing.
    """
    shapes = architecture.tiny_encoder_shapes()
    return {**{name: np.full(shape, np.nan, np.float16) for name, shape in shapes.items()}, **decoder}


def base_index() -> dict[str, Any]:
    """model_index.json of the base: a missing negative prompt means zeros."""
    return {
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": "0.39.0",
        "force_zeros_for_empty_prompt": True,
        **_IMAGE_PARTS,
        **_TEXT_PARTS,
    }


def refiner_index() -> dict[str, Any]:
    """model_index.json of the refiner: only the second encoder, aesthetic score, a missing negative prompt means ""."""
    absent: dict[str, Any] = {"text_encoder": [None, None], "tokenizer": [None, None]}
    return {
        "_class_name": "StableDiffusionXLImg2ImgPipeline",
        "_diffusers_version": "0.39.0",
        "force_zeros_for_empty_prompt": False,
        "requires_aesthetics_score": True,
        **_IMAGE_PARTS,
        **_TEXT_PARTS,
        **absent,
    }


def _write_text_side(folder: Path, suffix: str, tensors: Tensors, config: architecture.Config) -> None:
    _write_json(folder / f"text_encoder{suffix}/config.json", config)
    write_tensors(folder / f"text_encoder{suffix}/model.safetensors", tensors)
    pad = "!" if suffix else vocabulary.END
    tokenizer = folder / f"tokenizer{suffix}"
    _write_json(tokenizer / "vocab.json", vocabulary.vocabulary())
    _write_json(tokenizer / "tokenizer_config.json", vocabulary.tokenizer_config(pad))
    _write_json(tokenizer / "special_tokens_map.json", vocabulary.special_tokens_map(pad))
    rules = "\n".join(["#version: 0.2", *vocabulary.merges(), ""])
    _write(tokenizer / "merges.txt", rules.encode())


def _write_model(folder: Path, tensors: Tensors, config: architecture.Config) -> None:
    _write_json(folder / "config.json", config)
    write_tensors(folder / "diffusion_pytorch_model.safetensors", tensors)


def write_tensors(path: Path, tensors: Tensors) -> None:
    """Write a safetensors file for transformers and diffusers, atomically."""
    _write(path, save(tensors, {"format": "pt"}))


def _write_json(path: Path, content: Any) -> None:
    _write(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    """Write a sibling file, flush it to the disk, then rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
