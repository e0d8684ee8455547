"""Serve base and refiner with diffusers and FastAPI: ``python -m sdxl_trt.benchmarks.serving.diffusers_server``.

The server that a user of diffusers writes in forty lines: one picture at a time, at diffusers' best on this machine
(inference mode, the components that both experts share loaded once, all cores).
"""

__all__ = ["main"]

import argparse
import base64
import io
import threading
from typing import Any


def main() -> None:
    """Serve until the process is stopped."""
    parser = argparse.ArgumentParser(prog="python -m sdxl_trt.benchmarks.serving.diffusers_server", description=__doc__)
    parser.add_argument("--base", required=True)
    parser.add_argument("--refiner", required=True)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()

    import torch  # noqa: PLC0415 - keeps --help fast
    import uvicorn  # noqa: PLC0415
    from diffusers import (  # type: ignore[attr-defined,unused-ignore] # noqa: PLC0415
        StableDiffusionXLImg2ImgPipeline,
        StableDiffusionXLPipeline,
    )
    from fastapi import FastAPI  # noqa: PLC0415

    base = StableDiffusionXLPipeline.from_pretrained(arguments.base)
    refiner = StableDiffusionXLImg2ImgPipeline.from_pretrained(
        arguments.refiner, text_encoder_2=base.text_encoder_2, vae=base.vae
    )
    base.set_progress_bar_config(disable=True)
    refiner.set_progress_bar_config(disable=True)
    app, lock = FastAPI(), threading.Lock()

    @app.post("/v1/images/generations")
    def generate(asked: dict[str, Any]) -> dict[str, Any]:
        width, height = map(int, asked["size"].split("x"))
        common = {
            "prompt": asked["prompt"],
            "num_inference_steps": asked["steps"],
            "guidance_scale": asked["guidance_scale"],
        }
        with lock, torch.inference_mode():
            generator, split = torch.Generator().manual_seed(asked["seed"]), asked["handoff"]
            latents = base(**common, generator=generator, width=width, height=height, denoising_end=split,
                           output_type="latent").images  # fmt: skip
            picture = refiner(**common, generator=generator, image=latents, denoising_start=split).images[0]
        file = io.BytesIO()
        picture.save(file, "PNG")
        return {"data": [{"b64_json": base64.b64encode(file.getvalue()).decode()}]}

    uvicorn.run(app, port=arguments.port, log_level="error")


if __name__ == "__main__":
    main()
