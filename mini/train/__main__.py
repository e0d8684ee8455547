"""Train the pair, stage by stage: `python -m sdxl_trt.mini.train STAGE --folder DIR --minutes N`.

The stages, in order: vae, cache, base, refiner, decoder (finishes the autoencoder), publish. The training stages
resume from their checkpoints in the folder, and stop after `--minutes` or `--steps`.
"""

__all__ = ["main"]

import argparse
from pathlib import Path

import torch

from sdxl_trt.mini.pair import WEIGHTS
from sdxl_trt.mini.train.loop import Budget


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m sdxl_trt.mini.train", description=__doc__)
    parser.add_argument("stage", choices=("vae", "cache", "base", "refiner", "decoder", "publish"))
    parser.add_argument("--folder", type=Path, required=True, help="checkpoints and caches; a stage resumes from here")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--steps", type=float, default=float("inf"), help="with --steps alone a run is reproducible")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=24_000, help="size of the cache")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where publish writes")
    parser.add_argument("--freeze-text", action="store_true", help="base: continue without changing the encoders")
    parser.add_argument("--batch", type=int, default=32, help="base and refiner: pictures per step")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Run the chosen stage. Each reads the previous stages' results from the folder."""
    from sdxl_trt.mini.train import data as train_data  # noqa: PLC0415 (slow to load)
    from sdxl_trt.mini.train import publish as train_publish  # noqa: PLC0415
    from sdxl_trt.mini.train import unet as train_unet  # noqa: PLC0415
    from sdxl_trt.mini.train import vae as train_vae  # noqa: PLC0415

    budget = Budget(options.minutes, options.steps)
    if options.stage == "vae":
        train_vae.train_vae(options.folder, budget, options.seed)
    elif options.stage == "decoder":
        train_vae.train_decoder(options.folder, budget, options.seed)
    elif options.stage == "cache":
        train_data.build_cache(options.folder, options.pictures, options.threads)
    elif options.stage == "base":
        train_unet.train_base(options.folder, budget, options.seed, options.batch, options.freeze_text)
    elif options.stage == "refiner":
        train_unet.train_refiner(options.folder, budget, options.seed, options.batch)
    else:
        train_publish.publish(options.folder, options.weights)


def main(arguments: list[str] | None = None) -> None:
    """Run one stage."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    run(options)


if __name__ == "__main__":
    main()
