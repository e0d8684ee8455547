"""Train a LoRA on the embedded pair: `sticker`, with which every shape has a white border, as if cut out of paper.

The pair does not know white borders: none of its training pictures has one. No word asks for the border; the LoRA is a
style. Only low-rank branches beside some of the UNet's layers are trained; all weights of the pair stay as they are.
"""

__all__ = ["Branches", "Stickers", "attach", "draw_stickers", "lora_loss", "tensors_of", "train_lora"]

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from sdxl_trt.mini import architecture
from sdxl_trt.mini.embedded import LORAS, lora_path
from sdxl_trt.mini.pair import materialize, write_tensors
from sdxl_trt.mini.scenes import STICKER_BORDER, TRAINING_SEEDS, draw_caption, render, sample_scene
from sdxl_trt.mini.tensors import Tensors
from sdxl_trt.mini.train.loop import Budget, Loss, begin, train
from sdxl_trt.mini.train.text import tokenize
from sdxl_trt.mini.train.unet import REFINER_SNR_CAP, SNR_CAP, alphas, noised, weighted_error
from sdxl_trt.mini.train.vae import signals

Stage = Literal["base", "refiner"]

RANK = 4
PEAK_RATE = 4e-3
WARM_UP = 30
ENCODE_BATCH = 30
EMPTY_CHANCE = 0.1
"""Share of captions replaced by what stands for a missing negative prompt: zeros for the base, an encoded "" for the
refiner. Guidance pushes away from that picture, so both pictures must have the border."""
BASE_IDS = (128.0, 128.0, 0.0, 0.0, 128.0, 128.0)
REFINER_IDS = (128.0, 128.0, 0.0, 0.0, 6.0)
"""Original size, crop corner, and target size or aesthetic score: a request's defaults."""
LINEARS = ("to_q", "to_k", "to_v", "to_out.0")
CONVOLUTIONS = ("conv1", "conv2")
"""A branch has each of these in the UNet's way up: the attentions decide where a border is, the convolutions draw it.
Earlier layers have none, so a step computes no gradients for them."""


class Branches(nn.Module):  # type: ignore[misc]
    """Low-rank branches of a UNet: of `names[i]`, `down[i]` is `(rank, in, *kernel)`, `up[i]` `(out, rank)`."""

    def __init__(self, layers: dict[str, nn.Module], rank: int) -> None:
        """Create branches that change nothing yet: `down` is random, `up` is zero."""
        super().__init__()
        self.names = tuple(layers)
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for layer in layers.values():
            out, *inputs = layer.weight.shape
            self.down.append(nn.Parameter(torch.randn(rank, *inputs) / math.prod(inputs) ** 0.5))
            self.up.append(nn.Parameter(torch.zeros(out, rank, *(1 for _ in inputs[1:]))))


def attach(unet: nn.Module, rank: int = RANK) -> Branches:
    """Freeze `unet` and add a new branch to its layers: y = Wx + up · (down · x)."""
    unet.requires_grad_(False)
    layers = {name: layer for name, layer in unet.named_modules() if _is_target(name)}
    branches = Branches(layers, rank)
    for layer, down, up in zip(layers.values(), branches.down, branches.up, strict=True):
        layer.register_forward_hook(_adding(down, up))
    return branches


def _is_target(name: str) -> bool:
    attention = ".attn" in name and name.endswith(LINEARS)
    return name.startswith("up_blocks.") and (attention or name.endswith(CONVOLUTIONS))


def _adding(down: nn.Parameter, up: nn.Parameter) -> Callable[..., torch.Tensor]:
    def hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        if down.dim() == 2:
            return output + inputs[0] @ down.T @ up.T
        return output + functional.conv2d(functional.conv2d(inputs[0], down, None, layer.stride, layer.padding), up)

    return hook


def tensors_of(branches: Branches, weights: dict[str, torch.Tensor]) -> Tensors:
    """The branches' tensors in `weights` (by the names of `state_dict`) as float16, with diffusers' names."""
    named: Tensors = {}
    for i, name in enumerate(branches.names):
        for ours, theirs in (("down", "lora_A"), ("up", "lora_B")):
            named[f"unet.{name}.{theirs}.weight"] = weights[f"{ours}.{i}"].half().contiguous().numpy()
    return named


@dataclass(frozen=True)
class Stickers:
    """Pictures of stickers and their captions, encoded, float32.

    latents `(n, 4, 16, 16)`, scaled; states `(n, 77, 112)` of both text encoders; pooled `(n, 64)`; empty_states
    `(77, 112)` and empty_pooled `(64,)` of "".
    """

    latents: torch.Tensor
    states: torch.Tensor
    pooled: torch.Tensor
    empty_states: torch.Tensor
    empty_pooled: torch.Tensor


@torch.no_grad()  # type: ignore[untyped-decorator]
def draw_stickers(base: Path, count: int) -> Stickers:
    """Draw `count` clean stickers from the training seeds and encode them with the materialized pair's parts."""
    pictures, captions = [], []
    for seed in TRAINING_SEEDS[:count]:
        rng = np.random.default_rng((2, seed))
        scene = sample_scene(rng)
        pictures.append(render(scene, border=STICKER_BORDER))
        captions.append(draw_caption(scene.asked, rng))
    vae = AutoencoderKL.from_pretrained(base / "vae")
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in signals(pictures).split(ENCODE_BATCH)])
    states, pooled = _encoded(base, [*captions, ""])
    return Stickers(latents * vae.config.scaling_factor, states[:-1], pooled[:-1], states[-1], pooled[-1])


def _encoded(base: Path, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """SDXL's conditioning: both encoders' second last states `(n, 77, 112)`, and encoder 2's pooled vector."""
    first = CLIPTextModel.from_pretrained(base / "text_encoder", dtype=torch.float32)
    second = CLIPTextModelWithProjection.from_pretrained(base / "text_encoder_2", dtype=torch.float32)
    states, pooled = [], []
    for ids in torch.from_numpy(tokenize(captions)).split(ENCODE_BATCH):
        one = first(ids[:, 0], output_hidden_states=True).hidden_states[-2]
        two = second(ids[:, 1], output_hidden_states=True)
        states.append(torch.cat([one, two.hidden_states[-2]], dim=-1))
        pooled.append(two.text_embeds)
    return torch.cat(states), torch.cat(pooled)


def lora_loss(unet: nn.Module, stage: Stage, rows: Stickers, size: int) -> Loss:
    """The stage's loss on batches of `size` stickers: its timesteps, its conditioning, its weighting."""
    table = alphas()
    refines = stage == "refiner"
    timesteps_end = architecture.REFINER_STEPS if refines else architecture.TRAINING_STEPS
    time_ids = torch.tensor([REFINER_IDS if refines else BASE_IDS] * size)
    own = slice(architecture.text_encoder()["hidden_size"] if refines else 0, None)
    none = (rows.empty_states, rows.empty_pooled) if refines else (torch.zeros(()), torch.zeros(()))

    def loss(rng: np.random.Generator) -> torch.Tensor:
        at = torch.from_numpy(rng.integers(0, len(rows.latents), size))
        empty = torch.from_numpy(rng.random(size) < EMPTY_CHANCE)
        states = torch.where(empty[:, None, None], none[0], rows.states[at])[:, :, own]
        pooled = torch.where(empty[:, None], none[1], rows.pooled[at])
        timesteps = torch.randint(0, timesteps_end, (size,))
        noise = torch.randn_like(rows.latents[at])
        sample = noised(rows.latents[at], noise, timesteps, table)
        added: dict[str, Any] = {"text_embeds": pooled, "time_ids": time_ids}
        output = unet(sample, timesteps, states, added_cond_kwargs=added).sample
        signal = table[timesteps]
        return weighted_error(output, noise, signal / (1 - signal), REFINER_SNR_CAP if refines else SNR_CAP)

    return loss


def train_lora(stage: Stage, folder: Path, budget: Budget, seed: int, batch: int, count: int) -> None:
    """Train `stage`'s LoRA on `count` stickers and write it to `folder`, a float16 .safetensors file of 0.3 MB.

    A run resumes from its checkpoint in `folder`. With a budget in steps it is reproducible on the same machine.
    """
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as pair:
        base, refiner = materialize(pair)
        rows = draw_stickers(base, count)
        unet = UNet2DConditionModel.from_pretrained({"base": base, "refiner": refiner}[stage] / "unet")
    branches = attach(unet)
    path = folder / f"lora_{stage}_state.pt"
    loss = lora_loss(unet, stage, rows, batch)
    weights = train(begin(branches, path), loss, path, budget, peak=PEAK_RATE, seed=seed, warm_up=WARM_UP)
    write_tensors(folder / lora_path(LORAS[stage]).name, tensors_of(branches, weights))
