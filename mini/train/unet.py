"""Stages 2 and 3: the base with both text encoders, then the refiner on the lowest fifth of the noise levels."""

__all__ = ["train_base", "train_refiner", "without"]

from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from sdxl_trt.mini import architecture
from sdxl_trt.mini.train.data import Batch, Rows, draw_batch, load_cache
from sdxl_trt.mini.train.loop import Budget, Loss, Weights, begin, save_whole, train
from sdxl_trt.mini.train.text import Encoders
from sdxl_trt.mini.train.vae import load_vae

PEAK_RATE = 6e-4
SNR_CAP = 5.0
REFINER_SNR_CAP = 20.0
"""Higher than the base's, for detail; without a cap the last few timesteps outweigh those that decide shapes."""
BASE_DAMAGED_SHARE = 0.08
REFINER_DAMAGED_SHARE = 0.35
ZEROED_CHANCE = 0.07
EMPTY_CHANCE = 0.04


def alphas() -> torch.Tensor:
    """Cumulative products of the noise schedule, `(1000,)`: scaled linear betas."""
    plan = architecture.scheduler()
    betas = torch.linspace(plan["beta_start"] ** 0.5, plan["beta_end"] ** 0.5, architecture.TRAINING_STEPS) ** 2
    return (1 - betas).cumprod(0)


def noised(latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Latents with noise added for the given timesteps (variance preserving)."""
    signal = table[timesteps][:, None, None, None]
    return signal.sqrt() * latents + (1 - signal).sqrt() * noise


def weighted_error(output: torch.Tensor, noise: torch.Tensor, snr: torch.Tensor, cap: float) -> torch.Tensor:
    """Squared error of the noise, weighted by min(snr, cap) / snr (Min-SNR, Hang et al. 2023)."""
    errors = (output - noise).square().mean(dim=(1, 2, 3))
    return (errors * (snr.clamp(max=cap) / snr)).mean()


class Base(nn.Module):  # type: ignore[misc]
    """The base and both encoders, trained together."""

    def __init__(self, rows: int) -> None:
        """Create untrained weights; the token tables have `rows` rows."""
        super().__init__()
        self.unet = UNet2DConditionModel.from_config(architecture.base_unet())
        self.text = Encoders(rows)

    def forward(
        self, sample: torch.Tensor, timesteps: torch.Tensor, batch: Batch, zeroed: torch.Tensor
    ) -> torch.Tensor:
        """Predicted noise; rows in `zeroed` get zeros for text, as in inference without a negative prompt."""
        states, pooled = self.text(batch.ids)
        keep = (~zeroed).float()
        added = {"text_embeds": pooled * keep[:, None], "time_ids": batch.time_ids}
        states = states * keep[:, None, None]
        return self.unet(sample, timesteps, states, added_cond_kwargs=added).sample


class Refiner(nn.Module):  # type: ignore[misc]
    """The refiner alone: its encoder is the base's second one, frozen."""

    def __init__(self) -> None:
        """Create untrained weights."""
        super().__init__()
        self.unet = UNet2DConditionModel.from_config(architecture.refiner_unet())

    def forward(
        self,
        sample: torch.Tensor,
        timesteps: torch.Tensor,
        batch: Batch,
        states: torch.Tensor,
        pooled: torch.Tensor,
    ) -> torch.Tensor:
        """Predicted noise from encoder 2's states and the five ids: original size, crop corner, aesthetic score."""
        ids = torch.cat([batch.time_ids[:, :4], batch.score[:, None]], dim=1)
        added = {"text_embeds": pooled, "time_ids": ids}
        return self.unet(sample, timesteps, states, added_cond_kwargs=added).sample


def emptied(ids: torch.Tensor, rows: Rows, chance: float, rng: np.random.Generator) -> torch.Tensor:
    """Ids `(n, 2, 77)` with some captions replaced by ""."""
    chosen = torch.from_numpy(rng.random(len(ids)) < chance)
    return torch.where(chosen[:, None, None], torch.from_numpy(rows.empty)[None], ids)


def base_loss(model: Base, rows: Rows, scaling_factor: float, size: int) -> Loss:
    """The base's loss: all timesteps, a few damaged pictures, conditioning dropped as in inference."""
    table = alphas()

    def loss(rng: np.random.Generator) -> torch.Tensor:
        batch = draw_batch(rows, size, BASE_DAMAGED_SHARE, scaling_factor, rng)
        ids = emptied(batch.ids, rows, EMPTY_CHANCE, rng)
        batch = Batch(batch.latents, ids, batch.time_ids, batch.score)
        zeroed = torch.from_numpy(rng.random(size) < ZEROED_CHANCE)
        timesteps = torch.randint(0, architecture.TRAINING_STEPS, (size,))
        noise = torch.randn_like(batch.latents)
        output = model(noised(batch.latents, noise, timesteps, table), timesteps, batch, zeroed)
        signal = table[timesteps]
        return weighted_error(output, noise, signal / (1 - signal), SNR_CAP)

    return loss


def refiner_loss(model: Refiner, encoders: Encoders, rows: Rows, scaling_factor: float, size: int) -> Loss:
    """The refiner's loss: timesteps 0..199, many damaged pictures with their scores, some captions empty."""
    table = alphas()

    def loss(rng: np.random.Generator) -> torch.Tensor:
        batch = draw_batch(rows, size, REFINER_DAMAGED_SHARE, scaling_factor, rng)
        ids = emptied(batch.ids, rows, ZEROED_CHANCE + EMPTY_CHANCE, rng)
        with torch.no_grad():
            second = encoders.second(ids[:, 1], output_hidden_states=True)
        timesteps = torch.randint(0, architecture.REFINER_STEPS, (size,))
        noise = torch.randn_like(batch.latents)
        sample = noised(batch.latents, noise, timesteps, table)
        output = model(sample, timesteps, batch, second.hidden_states[-2], second.text_embeds)
        signal = table[timesteps]
        return weighted_error(output, noise, signal / (1 - signal), REFINER_SNR_CAP)

    return loss


def without(weights: Weights, prefix: str) -> Weights:
    """The weights with a prefix, which is removed from their names."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def train_base(folder: Path, budget: Budget, seed: int, batch: int, freeze_text: bool = False) -> None:
    """Train base and encoders; keeps `base.pt` (averaged weights of both, and the used token ids) up to date.

    With `freeze_text` a resumed run keeps the encoders of `base.pt` unchanged, so that they still fit the refiner.
    """
    torch.manual_seed(seed)
    rows = load_cache(folder)
    model = Base(len(rows.used) + 1)
    path = folder / "base_state.pt"
    state = begin(model, path)
    if freeze_text:
        model.text.load_state_dict(without(state.average, "text."))
        model.text.requires_grad_(False)

    def deliver(average: Weights) -> None:
        parts = {"unet": without(average, "unet."), "text": without(average, "text."), "used": rows.used}
        save_whole(parts, folder / "base.pt")

    train(
        state,
        base_loss(model, rows, load_vae(folder)[1], batch),
        path,
        budget,
        peak=PEAK_RATE,
        seed=seed,
        deliver=deliver,
    )


def load_encoders(folder: Path) -> Encoders:
    """The trained encoders with their compact tables, frozen."""
    saved = torch.load(folder / "base.pt", weights_only=False)
    encoders = Encoders(len(saved["used"]) + 1)
    encoders.load_state_dict(saved["text"])
    encoders.eval().requires_grad_(False)
    return encoders


def train_refiner(folder: Path, budget: Budget, seed: int, batch: int) -> None:
    """Train the refiner with frozen encoders; keeps `refiner.pt` (averaged weights) up to date."""
    torch.manual_seed(seed)
    rows = load_cache(folder)
    model = Refiner()
    path = folder / "refiner_state.pt"
    loss = refiner_loss(model, load_encoders(folder), rows, load_vae(folder)[1], batch)

    def deliver(average: Weights) -> None:
        save_whole({"unet": without(average, "unet.")}, folder / "refiner.pt")

    train(begin(model, path), loss, path, budget, peak=PEAK_RATE, seed=seed, deliver=deliver)
