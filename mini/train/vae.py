"""Stage 1: the autoencoder."""

__all__ = ["BATCH", "PEAK_RATE", "load_vae", "signals", "train_decoder", "train_vae"]

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional

from sdxl_trt.mini import architecture
from sdxl_trt.mini.scenes import SIDE, TRAINING_SEEDS, VALIDATION_SEEDS, Picture, example
from sdxl_trt.mini.train.loop import Budget, Weights, begin, save_whole, train

BATCH = 4
WINDOW = 64
WINDOW_BATCH = 6
WINDOW_CHANCE = 0.75
"""Most steps see windows of the pictures: half the cost of whole ones, and the flat parts teach nothing
twice.
"""
PEAK_RATE = 2e-3
KL_WEIGHT = 2e-6
SDXL_SCALING_FACTOR = 0.13025
LATENT_NOISE = 0.04
EDGE_WEIGHT = 1.0
SQUARE_WEIGHT = 1.0
COLOUR_WEIGHT = 0.3
COLOUR_SPREAD = 2.5
"""The first three latent channels are drawn towards the mean colour of their 8x8 pixels, times this spread:
the autoencoder then starts from a small picture instead of inventing a code, and the UNets learn from
one."""


def signals(pictures: list[Picture]) -> torch.Tensor:
    """uint8 pictures as a `(n, 3, 128, 128)` float32 batch in -1..1."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of pixels and of their differences to right and lower neighbours (edges,
    texture).
    """
    edges = sum(functional.l1_loss(output.diff(dim=axis), target.diff(dim=axis)) for axis in (-1, -2))
    return (
        functional.l1_loss(output, target) + SQUARE_WEIGHT * functional.mse_loss(output, target) + EDGE_WEIGHT * edges
    )


def training_batch(rng: np.random.Generator, tries: int = 1) -> torch.Tensor:
    """A few whole pictures, or more often some windows: of each picture the busiest of `tries` random ones."""
    windowed = rng.random() < WINDOW_CHANCE
    count = WINDOW_BATCH if windowed else BATCH
    seeds = rng.integers(TRAINING_SEEDS.start, TRAINING_SEEDS.stop, count)
    pictures = [example(int(one)).picture for one in seeds]
    return signals([busiest_window(one, tries, rng) for one in pictures] if windowed else pictures)


def busiest_window(picture: Picture, tries: int, rng: np.random.Generator) -> Picture:
    """The window of the picture with the most contrast, of a few whose corners lie on the latents' grid."""
    corners = 8 * rng.integers(0, (SIDE - WINDOW) // 8 + 1, (tries, 2))
    windows = [picture[y : y + WINDOW, x : x + WINDOW] for y, x in corners]
    return max(windows, key=lambda window: float(window.std(axis=(0, 1)).sum()))


def fresh_vae() -> AutoencoderKL:
    """An untrained autoencoder; its scaling factor is measured after training."""
    return AutoencoderKL.from_config(architecture.vae(1.0))


def train_vae(folder: Path, budget: Budget, seed: int) -> None:
    """Train, then write `vae.pt`: averaged weights and the measured scaling factor."""
    torch.manual_seed(seed)
    vae = fresh_vae()
    state = begin(vae, folder / "vae_state.pt")

    def loss(rng: np.random.Generator) -> torch.Tensor:
        batch = training_batch(rng)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
            output = vae.decode(posterior.sample()).sample
        colours = functional.mse_loss(posterior.mean[:, :3].float(), COLOUR_SPREAD * functional.avg_pool2d(batch, 8))
        kl = posterior.kl().float().mean()
        return reconstruction_loss(output.float(), batch) + COLOUR_WEIGHT * colours + KL_WEIGHT * kl

    vae.load_state_dict(train(state, loss, folder / "vae_state.pt", budget, peak=PEAK_RATE, seed=seed))
    standardise(vae.eval())
    factor = float(1 / validation_latents(vae).std())
    torch.save({"vae": vae.state_dict(), "scaling_factor": factor}, folder / "vae.pt")
    print(f"scaling_factor {factor:.5f}, mean absolute error {validation_error(vae):.2f} of 255", flush=True)


def load_vae(folder: Path) -> tuple[AutoencoderKL, float]:
    """The trained autoencoder and its scaling factor."""
    saved = torch.load(folder / "vae.pt")
    vae = fresh_vae()
    vae.load_state_dict(saved["vae"])
    return vae.eval(), saved["scaling_factor"]


def train_decoder(folder: Path, budget: Budget, seed: int) -> None:
    """Go on with the decoder alone: the latents that the UNets learnt stay as they are. Keeps `vae.pt` up
    to date.

    A little noise on the latents teaches it to draw cleanly from the slightly wrong ones that sampling ends
    with.
    """
    torch.manual_seed(seed)
    vae, scaling_factor = load_vae(folder)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    path = folder / "decoder_state.pt"

    def loss(rng: np.random.Generator) -> torch.Tensor:
        batch = training_batch(rng, tries=4)
        with torch.no_grad():
            latents = vae.encode(batch).latent_dist.sample()
        noise = LATENT_NOISE / scaling_factor * torch.randn_like(latents)
        output = vae.decode(latents + noise).sample
        return reconstruction_loss(output, batch)

    def deliver(average: Weights) -> None:
        save_whole({"vae": average, "scaling_factor": scaling_factor}, folder / "vae.pt")

    vae.load_state_dict(train(begin(vae, path), loss, path, budget, peak=PEAK_RATE, seed=seed, deliver=deliver))
    print(f"mean absolute error {validation_error(vae):.2f} of 255", flush=True)


@torch.no_grad()  # type: ignore[untyped-decorator]
def validation_latents(vae: AutoencoderKL, count: int = 256) -> torch.Tensor:
    """Mean latents `(count, 4, 16, 16)` of validation pictures."""
    batch = signals([example(VALIDATION_SEEDS[i]).picture for i in range(count)])
    return torch.cat([vae.encode(part).latent_dist.mean for part in batch.split(32)])


@torch.no_grad()  # type: ignore[untyped-decorator]
def standardise(vae: AutoencoderKL) -> None:
    """Give every latent channel mean 0 and the deviation of SDXL's, and the decoder the inverse.

    What it draws is unchanged; a caller that forgets the scaling factor sees it at once. The two 1x1
    convolutions around the latents absorb it, so the configuration needs one scaling factor only.
    """
    latents = validation_latents(vae)
    mean, deviation = latents.mean(dim=(0, 2, 3)), SDXL_SCALING_FACTOR * latents.std(dim=(0, 2, 3))
    into, out = vae.quant_conv, vae.post_quant_conv
    into.weight[:4] /= deviation[:, None, None, None]
    into.bias[:4] = (into.bias[:4] - mean) / deviation
    into.bias[4:] -= 2 * deviation.log()
    out.bias += (out.weight[:, :, 0, 0] * mean).sum(dim=1)
    out.weight *= deviation[None, :, None, None]


@torch.no_grad()  # type: ignore[untyped-decorator]
def validation_error(vae: AutoencoderKL, count: int = 64) -> float:
    """Mean absolute reconstruction error on validation pictures, in steps of 0..255."""
    batch = signals([example(VALIDATION_SEEDS[i]).picture for i in range(count)])
    output = vae.decode(vae.encode(batch).latent_dist.mean).sample
    return float((output.clamp(-1, 1) - batch).abs().mean() * 127.5)
