"""The tiny decoder: a small convolutional network that imitates the pair's full decoder at a fraction of its cost.

It learns from the full decoder's pictures, of latents that the pair draws and of encoded scenes with a little noise.
The encoder that its class has is not trained, and not published.
"""

__all__ = ["Lesson", "decoder_loss", "digest", "draw_lesson", "fresh_tiny", "scene_lesson", "train_tiny"]

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from safetensors.numpy import load_file
from torch import nn

from sdxl_trt.mini import architecture
from sdxl_trt.mini.pair import materialize
from sdxl_trt.mini.scenes import TRAINING_SEEDS, VALIDATION_SEEDS, draw_caption, example, sample_scene
from sdxl_trt.mini.tensors import Tensors
from sdxl_trt.mini.train.loop import Budget, Loss, begin, save_whole, train
from sdxl_trt.mini.train.vae import reconstruction_loss, signals

SCENES = 320
DRAWN = 96
UNSEEN = 16
BATCH = 8
"""Half of each batch are drawn latents, half are encoded scenes."""
PEAK_RATE = 3e-3
LATENT_NOISE = 0.04
STEPS, HANDOFF, GUIDANCE = 30, 0.8, 5.0
DRAW_BATCH = 16
DECODE_BATCH = 16


@dataclass(frozen=True)
class Lesson:
    """Scaled latents `(n, 4, 16, 16)` float32, and the full decoder's pictures of them in -1..1.

    pictures `(n, 3, 128, 128)` float16, a fraction of a pixel's 256 levels apart.
    """

    latents: torch.Tensor
    pictures: torch.Tensor


def fresh_tiny() -> AutoencoderTiny:
    """An untrained tiny autoencoder."""
    return AutoencoderTiny.from_config(architecture.tiny_vae())


def digest(vae: Tensors) -> str:
    """The SHA-256 of an autoencoder's tensors, by which a tiny decoder knows the one that it imitates."""
    found = hashlib.sha256()
    for name in sorted(vae):
        found.update(name.encode() + b"\0" + np.ascontiguousarray(vae[name]).tobytes())
    return found.hexdigest()


@torch.no_grad()  # type: ignore[untyped-decorator]
def taught(vae: AutoencoderKL, latents: torch.Tensor) -> Lesson:
    """The lesson of scaled latents. The pictures are clamped, as they are when they are written."""
    parts = (latents / vae.config.scaling_factor).to(memory_format=torch.channels_last).split(DECODE_BATCH)
    with torch.autocast("cpu", torch.bfloat16):
        pictures = torch.cat([vae.decode(part).sample for part in parts])
    return Lesson(latents, pictures.float().clamp(-1, 1).half())


@torch.no_grad()  # type: ignore[untyped-decorator]
def scene_lesson(vae: AutoencoderKL, seeds: range, seed: int) -> Lesson:
    """Encoded scenes with noise of a random strength, up to twice `LATENT_NOISE`: sampling ends slightly wrong too."""
    random = torch.Generator().manual_seed(seed)
    parts = signals([example(one).picture for one in seeds]).split(DECODE_BATCH)
    with torch.autocast("cpu", torch.bfloat16):
        means = [vae.encode(part.to(memory_format=torch.channels_last)).latent_dist.mean for part in parts]
    latents = torch.cat(means).float() * vae.config.scaling_factor
    strength = 2 * LATENT_NOISE * torch.rand(len(latents), 1, 1, 1, generator=random)
    lesson: Lesson = taught(vae, latents + strength * torch.randn(latents.shape, generator=random))
    return lesson


def draw_lesson(pair: Path, vae: AutoencoderKL, seeds: range) -> Lesson:
    """Latents that the pair of two diffusers folders in `pair` draws at its usual settings for training captions."""
    base = StableDiffusionXLPipeline.from_pretrained(pair / "base")
    refiner = StableDiffusionXLImg2ImgPipeline.from_pretrained(pair / "refiner")
    for each in (base, refiner):
        each.set_progress_bar_config(disable=True)
    latents = []
    for start in range(0, len(seeds), DRAW_BATCH):
        part = seeds[start : start + DRAW_BATCH]
        common: dict[str, Any] = {
            "prompt": [_caption(one) for one in part],
            "num_inference_steps": STEPS,
            "guidance_scale": GUIDANCE,
            "output_type": "latent",
        }
        random = [torch.Generator().manual_seed(one) for one in part]
        with torch.autocast("cpu", torch.bfloat16):
            handed = base(**common, generator=random, denoising_end=HANDOFF).images
            latents.append(refiner(**common, image=handed, denoising_start=HANDOFF).images.float())
        print(f"drew {start + len(part)} of {len(seeds)}", flush=True)
    lesson: Lesson = taught(vae, torch.cat(latents))
    return lesson


def _caption(seed: int) -> str:
    rng = np.random.default_rng((3, seed))
    return draw_caption(sample_scene(rng).asked, rng)


def decoder_loss(decoder: nn.Module, drawn: Lesson, scenes: Lesson) -> Loss:
    """The loss of a tiny `decoder` on batches of which one half is drawn and the other half are scenes."""

    def loss(rng: np.random.Generator) -> torch.Tensor:
        picked = [(one, torch.from_numpy(rng.integers(0, len(one.latents), BATCH // 2))) for one in (drawn, scenes)]
        latents = torch.cat([one.latents[at] for one, at in picked])
        pictures = torch.cat([one.pictures[at] for one, at in picked]).float()
        with torch.autocast("cpu", torch.bfloat16):
            output = decoder(latents.to(memory_format=torch.channels_last))
        return reconstruction_loss(output.float(), pictures)

    return loss


def train_tiny(folder: Path, budget: Budget, seed: int) -> None:
    """Train a decoder for the pair that was published in `folder`, else for the embedded pair. Writes `tiny.pt`.

    A run resumes from its checkpoint and its lessons in `folder`. With a budget in steps it is reproducible on the same
    machine.
    """
    with tempfile.TemporaryDirectory() as place:
        pair = folder / "pair" if (folder / "pair").exists() else materialize(place)[0].parent
        teacher = digest(load_file(pair / "base/vae/diffusion_pytorch_model.safetensors"))
        drawn, scenes, unseen = _lessons(folder / "tiny_lessons.pt", pair, seed)
    torch.manual_seed(seed)
    decoder = fresh_tiny().decoder.to(memory_format=torch.channels_last)
    path = folder / "tiny_state.pt"
    loss = decoder_loss(decoder, drawn, scenes)
    decoder.load_state_dict(train(begin(decoder, path), loss, path, budget, peak=PEAK_RATE, seed=seed))
    weights = {f"decoder.{name}": value.contiguous() for name, value in decoder.state_dict().items()}
    save_whole({"tiny": weights, "teacher": teacher}, folder / "tiny.pt")
    print(f"{likeness(decoder, unseen):.2f} dB to the full decoder", flush=True)


def _lessons(path: Path, pair: Path, seed: int) -> tuple[Lesson, Lesson, Lesson]:
    """Lessons of draws, of scenes, and of scenes that are not for training; kept at `path` for the next run.

    Those of another pair or seed are made again.
    """
    files = (hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(pair.rglob("*.safetensors")))
    key = f"{seed} {DRAWN} {SCENES} {' '.join(files)}"
    saved = torch.load(path) if path.exists() else {}
    if saved.get("key") != key:
        vae = AutoencoderKL.from_pretrained(pair / "base/vae").eval().to(memory_format=torch.channels_last)
        made = (
            draw_lesson(pair, vae, TRAINING_SEEDS[:DRAWN]),
            scene_lesson(vae, TRAINING_SEEDS[:SCENES], seed),
            scene_lesson(vae, VALIDATION_SEEDS[:UNSEEN], seed),
        )
        saved = {"key": key, "lessons": [(one.latents, one.pictures) for one in made]}
        save_whole(saved, path)
    drawn, scenes, unseen = (Lesson(*one) for one in saved["lessons"])
    return drawn, scenes, unseen


@torch.no_grad()  # type: ignore[untyped-decorator]
def likeness(decoder: nn.Module, lesson: Lesson) -> float:
    """The median over a lesson's pictures of the PSNR between the decoder's and the full one's, in dB."""
    output = torch.cat([decoder(part) for part in lesson.latents.split(DECODE_BATCH)]).clamp(-1, 1)
    errors = (output - lesson.pictures).square().mean(dim=(1, 2, 3))
    return float((10 * (4 / errors).log10()).median())
