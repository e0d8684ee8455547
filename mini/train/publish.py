"""Last stage: write the averaged weights as float16 safetensors under the published names, for `pair.py`."""

__all__ = ["publish"]

from pathlib import Path

import numpy as np
import torch

from sdxl_trt.mini.pair import TOKEN_IDS, WEIGHTS, Tensors, write_tensors
from sdxl_trt.mini.train.unet import without


def published_clip(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """CLIP weights with the `text_model.` prefix, which transformers 5 omits and older releases need."""
    bare = ("text_model.", "text_projection.")
    return {name if name.startswith(bare) else f"text_model.{name}": value for name, value in weights.items()}


def halves(weights: dict[str, torch.Tensor]) -> Tensors:
    """The floating-point tensors as float16 arrays."""
    return {name: value.half().contiguous().numpy() for name, value in weights.items() if value.is_floating_point()}


def publish(folder: Path, target: Path = WEIGHTS) -> None:
    """Write the parts trained so far in `folder` (vae.pt, base.pt, refiner.pt) to `target`."""
    if (folder / "vae.pt").exists():
        saved = torch.load(folder / "vae.pt")
        write_tensors(
            target / "vae.safetensors",
            halves(saved["vae"]),
            {"scaling_factor": repr(saved["scaling_factor"])},
        )
    if (folder / "base.pt").exists():
        saved = torch.load(folder / "base.pt", weights_only=False)
        write_tensors(target / "base_unet.safetensors", halves(saved["unet"]))
        ids = {TOKEN_IDS: np.asarray(saved["used"], np.int64)}
        for name, prefix in (("text_encoder", "first."), ("text_encoder_2", "second.")):
            weights = published_clip(without(saved["text"], prefix))
            write_tensors(target / f"{name}.safetensors", {**halves(weights), **ids})
    if (folder / "refiner.pt").exists():
        write_tensors(target / "refiner_unet.safetensors", halves(torch.load(folder / "refiner.pt")["unet"]))
