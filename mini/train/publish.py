"""Last stage: write the averaged weights as float16 to two diffusers folders, from which the bundle is exported."""

__all__ = ["publish"]

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sdxl_trt.mini import architecture
from sdxl_trt.mini.pair import TOKEN_TABLE, Parts, embedded_parts, write_pair
from sdxl_trt.mini.tensors import Tensors
from sdxl_trt.mini.train.tiny import digest
from sdxl_trt.mini.train.unet import without


def published_clip(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """CLIP weights with the `text_model.` prefix, which transformers 5 omits and older releases need."""
    bare = ("text_model.", "text_projection.")
    return {name if name.startswith(bare) else f"text_model.{name}": value for name, value in weights.items()}


def halves(weights: dict[str, torch.Tensor]) -> Tensors:
    """The floating-point tensors as float16 arrays."""
    return {name: value.half().contiguous().numpy() for name, value in weights.items() if value.is_floating_point()}


def whole_table(rows: npt.NDArray[Any], used: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """A token table `(49408, width)`: `rows[1:]` at the ids in `used`, and `rows[0]` for all other tokens."""
    table = np.repeat(rows[:1], architecture.VOCABULARY_SIZE, axis=0)
    table[used] = rows[1:]
    return table


def publish(folder: Path) -> None:
    """Write the parts trained so far in `folder` (vae.pt, base.pt, refiner.pt, tiny.pt) to `folder`/pair.

    The other parts are those of the embedded pair; its tiny decoder imitates its autoencoder, and goes with another.
    Raises `ValueError` if tiny.pt imitates another autoencoder than the one that is published.
    """
    parts = embedded_parts()
    if (folder / "vae.pt").exists():
        saved = torch.load(folder / "vae.pt")
        parts = replace(parts, vae=halves(saved["vae"]), scaling_factor=saved["scaling_factor"], tiny_vae=None)
    if (folder / "base.pt").exists():
        saved = torch.load(folder / "base.pt", weights_only=False)
        first, second = (_encoder(saved, prefix) for prefix in ("first.", "second."))
        parts = replace(parts, base_unet=halves(saved["unet"]), text_encoder=first, text_encoder_2=second)
    if (folder / "refiner.pt").exists():
        parts = replace(parts, refiner_unet=halves(torch.load(folder / "refiner.pt")["unet"]))
    write_pair(folder / "pair", replace(parts, tiny_vae=_tiny(folder / "tiny.pt", parts)))


def _tiny(path: Path, parts: Parts) -> Tensors | None:
    if not path.exists():
        return parts.tiny_vae
    saved = torch.load(path)
    if saved["teacher"] != digest(parts.vae):
        raise ValueError(f"{path}: imitates another autoencoder than the pair's; remove it, publish, train anew")
    return halves(saved["tiny"])


def _encoder(saved: dict[str, Any], prefix: str) -> Tensors:
    tensors = halves(published_clip(without(saved["text"], prefix)))
    return {**tensors, TOKEN_TABLE: whole_table(tensors[TOKEN_TABLE], np.asarray(saved["used"], np.int64))}
