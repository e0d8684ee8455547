"""Draw one picture with diffusers: ``python -m sdxl_trt.benchmarks.contestants.diffusers_picture``.

The script that a user of diffusers writes for base and refiner, and nothing else: trt-bench measures all of it.
"""

__all__ = ["main"]

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Draw the picture and save it."""
    parser = argparse.ArgumentParser(
        prog="python -m sdxl_trt.benchmarks.contestants.diffusers_picture", description=__doc__
    )
    parser.add_argument("prompt")
    parser.add_argument("--base", type=Path, required=True, help="folder of the base")
    parser.add_argument("--refiner", type=Path, help="folder of the refiner (default: base alone)")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--handoff", type=float, default=0.8)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    import torch  # noqa: PLC0415 - keeps --help fast
    from diffusers import (  # type: ignore[attr-defined,unused-ignore] # noqa: PLC0415
        StableDiffusionXLImg2ImgPipeline,
        StableDiffusionXLPipeline,
    )

    base = StableDiffusionXLPipeline.from_pretrained(arguments.base)
    common = {
        "prompt": arguments.prompt,
        "num_inference_steps": arguments.steps,
        "guidance_scale": arguments.guidance,
        "generator": torch.Generator().manual_seed(arguments.seed),
    }
    size = {"width": arguments.width, "height": arguments.height}
    if arguments.refiner is None:
        base(**common, **size).images[0].save(arguments.out)
        return 0
    # As in diffusers' documentation: components that both experts share are loaded once.
    refiner = StableDiffusionXLImg2ImgPipeline.from_pretrained(
        arguments.refiner, text_encoder_2=base.text_encoder_2, vae=base.vae
    )
    latents = base(**common, **size, denoising_end=arguments.handoff, output_type="latent").images
    refiner(**common, image=latents, denoising_start=arguments.handoff).images[0].save(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
