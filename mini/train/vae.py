"""Stage 1: the autoencoder."""

__all__ = ["load_vae", "signals", "train_decoder", "train_vae"]

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
"""Most steps use windows of the pictures: they cost half as much as whole ones, which repeat flat areas."""
PEAK_RATE = 2e-3
KL_WEIGHT = 2e-6
SDXL_SCALING_FACTOR = 0.13025
LATENT_NOISE = 0.04
EDGE_WEIGHT = 1.0
SQUARE_WEIGHT = 1.0
COLOUR_WEIGHT = 0.3
COLOUR_SPREAD = 2.5
"""The first three latent channels are pulled towards the mean colour of their 8x8 pixels, times this spread: the
autoencoder then starts from a small picture instead of an arbitrary code, and the UNets learn from one."""


def signals(pictures: list[Picture]) -> torch.Tensor:
    """uint8 pictures as an `(n, 3, 128, 128)` float32 batch in -1..1."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Error of pixels, absolute and squared, and of their differences to right and lower neighbours (edges)."""
    edges = sum(functional.l1_loss(output.diff(dim=axis), target.diff(dim=axis)) for axis in (-1, -2))
    return (
        functional.l1_loss(output, target) + SQUARE_WEIGHT * functional.mse_loss(output, target) + EDGE_WEIGHT * edges
    )


def training_batch(rng: np.random.Generator, tries: int = 1) -> torch.Tensor:
    """A few whole pictures, or more often windows: from each picture the busiest of `tries` random ones."""
    windowed = rng.random() < WINDOW_CHANCE
    count = WINDOW_BATCH if windowed else BATCH
    seeds = rng.integers(TRAINING_SEEDS.start, TRAINING_SEEDS.stop, count)
    pictures = [example(int(one)).picture for one in seeds]
    return signals([busiest_window(one, tries, rng) for one in pictures] if windowed else pictures)


def busiest_window(picture: Picture, tries: int, rng: np.random.Generator) -> Picture:
    """The window with the most contrast of `tries` random ones, aligned to the latents' grid."""
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
    """Continue with the decoder alone, so that the latents stay those the UNets learnt. Keeps `vae.pt` up to date.

    A little noise on the latents teaches it to decode the slightly wrong latents of sampling cleanly.
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
def validation_latents(vae: AutoencoderKL) -> torch.Tensor:
    """Mean latents `(256, 4, 16, 16)` of validation pictures."""
    batch = signals([example(VALIDATION_SEEDS[i]).picture for i in range(256)])
    return torch.cat([vae.encode(part).latent_dist.mean for part in batch.split(32)])


@torch.no_grad()  # type: ignore[untyped-decorator]
def standardise(vae: AutoencoderKL) -> None:
    """Give every latent channel mean 0 and the deviation of SDXL's, and the decoder the inverse.

    Decoded pictures do not change; a caller that forgets the scaling factor notices at once. The two 1x1 convolutions
    around the latents absorb the change, so the config needs only one scaling factor.
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
def validation_error(vae: AutoencoderKL) -> float:
    """Mean absolute reconstruction error on validation pictures, on the scale 0..255."""
    batch = signals([example(VALIDATION_SEEDS[i]).picture for i in range(64)])
    output = vae.decode(vae.encode(batch).latent_dist.mean).sample
    return float((output.clamp(-1, 1) - batch).abs().mean() * 127.5)
