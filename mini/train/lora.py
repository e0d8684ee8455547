"""Train a LoRA on the embedded pair: `sticker`, with which every shape has a white border, as if cut out of paper.

The pair does not know white borders: none of its training pictures has one. No word asks for the border; the LoRA is a
style. Only low-rank branches beside some of the UNet's layers are trained; all weights of the pair stay as they are.

Each training picture has a scale of its own: its border is that share of the whole width, and the branches are added at
that scale, so that scales below 1 are trained too.
"""

__all__ = ["Branches", "Stickers", "attach", "draw_stickers", "lora_loss", "tensors_of", "train_lora"]

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from sdxl_trt.mini import architecture
from sdxl_trt.mini.embedded import lora_path
from sdxl_trt.mini.pair import materialize, write_tensors
from sdxl_trt.mini.scenes import STICKER_BORDER, TRAINING_SEEDS, draw_caption, render, sample_scene
from sdxl_trt.mini.tensors import Tensors
from sdxl_trt.mini.train.loop import Budget, Loss, begin, train
from sdxl_trt.mini.train.text import tokenize
from sdxl_trt.mini.train.unet import SNR_CAP, alphas, noised, weighted_error
from sdxl_trt.mini.train.vae import signals

RANK = 4
PEAK_RATE = 4e-3
WARM_UP = 30
ENCODE_BATCH = 30
ZEROED_CHANCE = 0.1
"""Share of captions replaced by the zeros that stand for a missing negative prompt: guidance pushes away from that
picture, so it must have the border too."""
LEAST_SCALE = 0.2
"""Training scales are drawn from here to 1."""
TIME_IDS = (128.0, 128.0, 0.0, 0.0, 128.0, 128.0)
"""Original size, crop corner and target size of a whole picture."""
LINEARS = ("to_q", "to_k", "to_v", "to_out.0")
CONVOLUTIONS = ("conv1", "conv2")
"""A branch has each of these in the UNet's way up: the attentions decide where a border is, the convolutions draw it.
Earlier layers have none, so a step computes no gradients for them."""


class Branches(nn.Module):  # type: ignore[misc]
    """Low-rank branches of a UNet's layers: for `names[i]`, `down[i]` `(rank, in, …)` and `up[i]` `(out, rank, …)`."""

    def __init__(self, layers: dict[str, nn.Module], rank: int) -> None:
        """Create branches that change nothing yet: `down` is random, `up` is zero."""
        super().__init__()
        self.names = tuple(layers)
        self.scales = torch.ones(1)
        """The scale at which the branches are added to each row, `(rows,)` or `(1,)`."""
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
        layer.register_forward_hook(_adding(branches, down, up))
    return branches


def _is_target(name: str) -> bool:
    attention = ".attn" in name and name.endswith(LINEARS)
    return name.startswith("up_blocks.") and (attention or name.endswith(CONVOLUTIONS))


def _adding(branches: Branches, down: nn.Parameter, up: nn.Parameter) -> Callable[..., torch.Tensor]:
    def hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        scales = branches.scales.reshape(-1, *(1 for _ in output.shape[1:]))
        if down.dim() == 2:
            return output + scales * (inputs[0] @ down.T @ up.T)
        low = functional.conv2d(inputs[0], down, None, layer.stride, layer.padding)
        return output + scales * functional.conv2d(low, up)

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

    latents `(n, 4, 16, 16)`, scaled; states `(n, 77, 112)` of both text encoders; pooled `(n, 64)` of the second;
    scales `(n,)`, the share of the whole border that each picture has.
    """

    scales: torch.Tensor
    latents: torch.Tensor
    states: torch.Tensor
    pooled: torch.Tensor


@torch.no_grad()  # type: ignore[untyped-decorator]
def draw_stickers(base: Path, count: int) -> Stickers:
    """Draw `count` clean stickers from the training seeds and encode them with the materialized base's parts."""
    pictures, captions, scales = [], [], []
    for seed in TRAINING_SEEDS[:count]:
        rng = np.random.default_rng((2, seed))
        scene = sample_scene(rng)
        scales.append(rng.uniform(LEAST_SCALE, 1.0))
        pictures.append(render(scene, border=scales[-1] * STICKER_BORDER))
        captions.append(draw_caption(scene.asked, rng))
    vae = AutoencoderKL.from_pretrained(base / "vae")
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in signals(pictures).split(ENCODE_BATCH)])
    return Stickers(torch.tensor(scales), latents * vae.config.scaling_factor, *_encoded(base, captions))


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


def lora_loss(unet: nn.Module, branches: Branches, rows: Stickers, size: int) -> Loss:
    """The loss of the base's `unet` with its `branches` on batches of `size` stickers, as in the base's training."""
    table = alphas()
    time_ids = torch.tensor([TIME_IDS] * size)

    def loss(rng: np.random.Generator) -> torch.Tensor:
        at = torch.from_numpy(rng.integers(0, len(rows.latents), size))
        kept = torch.from_numpy(rng.random(size) >= ZEROED_CHANCE).float()
        timesteps = torch.randint(0, architecture.TRAINING_STEPS, (size,))
        noise = torch.randn_like(rows.latents[at])
        added = {"text_embeds": rows.pooled[at] * kept[:, None], "time_ids": time_ids}
        states = rows.states[at] * kept[:, None, None]
        sample = noised(rows.latents[at], noise, timesteps, table)
        branches.scales = rows.scales[at].float()
        output = unet(sample, timesteps, states, added_cond_kwargs=added).sample
        branches.scales = torch.ones(1)
        signal = table[timesteps]
        return weighted_error(output, noise, signal / (1 - signal), SNR_CAP)

    return loss


def train_lora(folder: Path, budget: Budget, seed: int, batch: int, count: int) -> None:
    """Train the LoRA on `count` stickers and write it to `folder`, a float16 .safetensors file of 0.25 MB.

    A run resumes from its checkpoint in `folder`. With a budget in steps it is reproducible on the same machine.
    """
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as pair:
        base, _ = materialize(pair)
        rows = draw_stickers(base, count)
        unet = UNet2DConditionModel.from_pretrained(base / "unet")
    branches = attach(unet)
    path = folder / "lora_state.pt"
    loss = lora_loss(unet, branches, rows, batch)
    weights = train(begin(branches, path), loss, path, budget, peak=PEAK_RATE, seed=seed, warm_up=WARM_UP)
    write_tensors(folder / lora_path().name, tensors_of(branches, weights))
