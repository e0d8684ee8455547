"""Train the pair, stage by stage: `python -m sdxl_trt.mini.train STAGE --folder DIR --minutes N`.

The stages, in order: vae, cache, base, refiner, decoder (finishes the autoencoder), publish (writes the pair to
DIR/pair). The training stages resume from their checkpoints in the folder, and stop after `--minutes` or `--steps`.

tiny trains a tiny decoder for the pair in DIR/pair, else for the embedded pair; publish it afterwards.

lora trains a LoRA on the embedded pair's base, and writes it to the folder.
"""

__all__ = ["main"]

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from sdxl_trt.mini.train.loop import Budget

STAGES = ("vae", "cache", "base", "refiner", "decoder", "publish", "tiny", "lora")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m sdxl_trt.mini.train", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--folder", type=Path, required=True, help="checkpoints and caches; a stage resumes from here")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--steps", type=float, default=float("inf"), help="with --steps alone a run is reproducible")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=24_000, help="size of the cache, or of the LoRA's training set")
    parser.add_argument("--freeze-text", action="store_true", help="base: continue without changing the encoders")
    parser.add_argument("--batch", type=int, default=32, help="pictures per step, but for vae, decoder and tiny")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Run the chosen stage. Each reads the previous stages' results from the folder."""
    from sdxl_trt.mini.train import data, lora, publish, tiny, unet, vae  # noqa: PLC0415 (slow to load)

    folder, budget, seed, batch = options.folder, Budget(options.minutes, options.steps), options.seed, options.batch
    stages: dict[str, Callable[[], None]] = {
        "vae": lambda: vae.train_vae(folder, budget, seed),
        "cache": lambda: data.build_cache(folder, options.pictures, options.threads),
        "base": lambda: unet.train_base(folder, budget, seed, batch, options.freeze_text),
        "refiner": lambda: unet.train_refiner(folder, budget, seed, batch),
        "decoder": lambda: vae.train_decoder(folder, budget, seed),
        "publish": lambda: publish.publish(folder),
        "tiny": lambda: tiny.train_tiny(folder, budget, seed),
        "lora": lambda: lora.train_lora(folder, budget, seed, batch, options.pictures),
    }
    stages[options.stage]()


def main(arguments: list[str] | None = None) -> None:
    """Run one stage."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    run(options)


if __name__ == "__main__":
    main()
