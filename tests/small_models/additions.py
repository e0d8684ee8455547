"""What is added to a small pair: a LoRA, an embedding, a ControlNet, and a UNet that takes a mask."""

import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.engines.bundle.tensor_table import read_table

# By out_proj diffusers knows whose names those of a text encoder are.
ADAPTED = (".to_q.weight", ".to_v.weight", ".q_proj.weight", ".out_proj.weight")
PARTS = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}


def save_lora(path: Path, bundle: Path, seed: int, *, refiner: bool = False) -> None:
    """Write a LoRA of rank 2 for a bundle's base with its text encoders, or for its refiner."""
    rng, opened, tensors = np.random.default_rng(seed), read_bundle(bundle), {}
    for part in ("unet",) if refiner else PARTS:
        shapes = read_table(opened, "refiner_unet" if refiner else part).shapes
        for name in [name for name in shapes if name.endswith(ADAPTED)]:
            outer = "" if part == "unet" or name.startswith("text_model.") else "text_model_"
            module = f"{PARTS[part]}_{outer}{name.removesuffix('.weight').replace('.', '_')}"
            outputs, inputs = shapes[name]
            tensors[f"{module}.lora_down.weight"] = rng.standard_normal((2, inputs), np.float32) / inputs**0.5
            tensors[f"{module}.lora_up.weight"] = rng.standard_normal((outputs, 2), np.float32)
    save_file(tensors, path)


def save_tiny_vae(folder: Path, vae: Path, seed: int = 0, *, scaling: float = 1.0) -> None:
    """Write a tiny autoencoder with random weights for the latents of the autoencoder at `vae`."""
    import torch
    from diffusers import AutoencoderTiny

    levels = len(json.loads((vae / "config.json").read_text())["block_out_channels"])
    torch.manual_seed(seed)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8,) * levels, decoder_block_out_channels=(8,) * levels,
        num_encoder_blocks=(1,) * levels, num_decoder_blocks=(1,) * levels, scaling_factor=scaling,
    )  # fmt: skip
    tiny.save_pretrained(folder)


def save_embedding(path: Path, base: Path) -> None:
    """Write an embedding whose vectors are those of two words, "blue star"."""
    tensors = {}
    for key, name in (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2")):
        vocabulary = json.loads((base / name.replace("text_encoder", "tokenizer") / "vocab.json").read_text())
        (table,) = (value for tensor, value in load_file(base / name / "model.safetensors").items()
                    if tensor.endswith("token_embedding.weight"))  # fmt: skip
        tensors[key] = np.stack([table[vocabulary[f"{word}</w>"]] for word in ("blue", "star")])
    save_file(tensors, path)


def save_controlnet(folder: Path, unet: Path, seed: int = 0) -> Path:
    """Write a ControlNet for the UNet of a folder, and return its folder."""
    import torch
    from diffusers import ControlNetModel, UNet2DConditionModel

    model = UNet2DConditionModel.from_pretrained(unet)
    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(model, conditioning_embedding_out_channels=(16, 32), load_weights_from_unet=False)
    for name, parameter in net.named_parameters():
        if "controlnet_" in name:  # zero at the start of a training
            torch.nn.init.normal_(parameter, 0, 0.1)
    net.save_pretrained(folder)
    return folder


def save_nine_channels(base: Path, folder: Path) -> Path:
    """Copy a base with a random UNet of nine channels, as inpainting models have, and return its folder."""
    import torch
    from diffusers import UNet2DConditionModel

    copy = Path(shutil.copytree(base, folder))
    config = json.loads((copy / "unet" / "config.json").read_text()) | {"in_channels": 9}
    torch.manual_seed(9)
    UNet2DConditionModel.from_config(config).save_pretrained(copy / "unet")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionXLInpaintPipeline"}))
    return copy


def save_pictures(folder: Path, width: int, height: int) -> None:
    """Write photo.png, mask.png and edges.png, of `width` × `height` pixels."""
    y, x = np.mgrid[:height, :width]
    disc = np.hypot(y - height / 2, x - width / 3) < height / 3
    channels = [np.where(disc, 220, x * 5), np.where(disc, 60, y * 7), np.where((x // 8 + y // 8) % 2, 200, 30)]
    Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8)).save(folder / "photo.png")
    Image.fromarray(np.where(x > width // 3, 255, 0).astype(np.uint8)).save(folder / "mask.png")
    edges = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(edges).save(folder / "edges.png")
