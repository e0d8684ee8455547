"""Write the embedded pair as two ordinary diffusers folders, `base/` and `refiner/`, from the package's weights.

Needs only numpy and safetensors. Weights are float16 with the key names that SDXL publishes (CLIP's keys start with
`text_model.`); shared parts are stored once, and the token tables are stored without their repeated rows.
"""

__all__ = [
    "TOKEN_IDS",
    "TOKEN_TABLE",
    "WEIGHTS",
    "Tensors",
    "materialize",
    "stored",
    "with_whole_table",
    "write_tensors",
]

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save

from sdxl_trt.mini import architecture
from sdxl_trt.mini import clip_vocabulary as vocabulary

WEIGHTS = Path(__file__).with_name("weights")
TOKEN_TABLE = "text_model.embeddings.token_embedding.weight"  # noqa: S105 (a tensor's name)
TOKEN_IDS = "token_ids"  # noqa: S105
"""Key in a stored encoder: the ids of the token table's rows after the first; the first row is for all other tokens."""

Tensors = dict[str, npt.NDArray[Any]]

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


def materialize(directory: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write `base/` and `refiner/` into `directory` and return their paths. Existing files are replaced atomically.

    Raises `FileNotFoundError` if the package was installed without its weights.
    """
    base, refiner = Path(directory, "base"), Path(directory, "refiner")
    _write_json(base / "model_index.json", base_index())
    _write_json(refiner / "model_index.json", refiner_index())
    _write_text_side(base, "", stored("text_encoder"), architecture.text_encoder())
    second = stored("text_encoder_2")
    for folder in (base, refiner):
        _write_text_side(folder, "_2", second, architecture.text_encoder_2())
        _write_vae(folder / "vae")
        _write_json(folder / "scheduler/scheduler_config.json", architecture.scheduler())
    _write_unet(base / "unet", stored("base_unet"), architecture.base_unet())
    _write_unet(refiner / "unet", stored("refiner_unet"), architecture.refiner_unet())
    return base, refiner


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


def stored(part: str) -> Tensors:
    """The stored tensors of a part; an encoder's token table is expanded to the whole vocabulary."""
    path = WEIGHTS / f"{part}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: missing from the embedded weights; reinstall sdxl-trt, or train them: mini/MODEL_CARD.md"
        )
    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    return with_whole_table(tensors) if TOKEN_IDS in tensors else tensors


def with_whole_table(tensors: Tensors) -> Tensors:
    """An encoder's tensors with one token-table row for each of CLIP's 49,408 ids."""
    whole = dict(tensors)
    ids, rows = whole.pop(TOKEN_IDS), whole[TOKEN_TABLE]
    table = np.repeat(rows[:1], architecture.VOCABULARY_SIZE, axis=0)
    table[ids] = rows[1:]
    whole[TOKEN_TABLE] = table
    return whole


def scaling_factor() -> float:
    """1 / standard deviation of the trained latents, stored in the header of the autoencoder's file."""
    with safe_open(WEIGHTS / "vae.safetensors", framework="numpy") as file:
        return float(file.metadata()["scaling_factor"])


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


def _write_vae(folder: Path) -> None:
    _write_json(folder / "config.json", architecture.vae(scaling_factor()))
    write_tensors(folder / "diffusion_pytorch_model.safetensors", stored("vae"))


def _write_unet(folder: Path, tensors: Tensors, config: architecture.Config) -> None:
    _write_json(folder / "config.json", config)
    write_tensors(folder / "diffusion_pytorch_model.safetensors", tensors)


def write_tensors(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file for transformers and diffusers, atomically."""
    _write(path, save(tensors, {"format": "pt", **(metadata or {})}))


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
