"""Shared by the contestants with diffusers' pipeline interface: load a source, draw a picture."""

__all__ = ["draw", "load_source", "watch"]

import functools
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_trt.benchmarks.contestants.protocol import Array, Done, Spec


def load_source(pipeline_class: Any, source: str, **settings: Any) -> Any:
    """Return the pipeline of a folder, single file or hub id, with progress bars disabled."""
    load = pipeline_class.from_single_file if Path(source).is_file() else pipeline_class.from_pretrained
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = load(source, **settings)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def watch(base: Any, refiner: Any) -> dict[str, float]:
    """Wrap the pipelines' prompt encoding and decoding; return seconds by stage, to which each call adds its time."""
    seconds = dict.fromkeys(("encode", "base", "refiner", "decode"), 0.0)

    def timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        # The pipelines inspect the signatures of what they call.
        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            result = function(*arguments, **named)
            seconds[stage] += time.perf_counter() - started
            return result

        return call

    for pipeline in (base, refiner):
        if pipeline is not None:
            pipeline.encode_prompt = timed("encode", pipeline.encode_prompt)
            pipeline.vae.decode = timed("decode", pipeline.vae.decode)
    return seconds


def draw(base: Any, refiner: Any, spec: Spec, latents: Array, seconds: dict[str, float]) -> Done:
    """Draw the pictures of `spec` from noise (batch, 4, h, w), with base and refiner, or the base if that is None.

    `seconds` is what `watch` returned for these two.
    """
    import torch  # noqa: PLC0415 - not in every contestant's environment

    seconds.update(dict.fromkeys(seconds, 0.0))
    noise = torch.from_numpy(latents.astype(np.float32)).to(device=base.device, dtype=base.unet.dtype)
    common: dict[str, Any] = {"prompt": [spec.prompt] * len(latents), "num_inference_steps": spec.steps,
                              "guidance_scale": spec.guidance}  # fmt: skip
    size = {"width": spec.width, "height": spec.height}
    started = time.perf_counter()
    if refiner is None:
        images = base(**common, **size, latents=noise).images
        output = _pixels(images)
        seconds["base"] = time.perf_counter() - started - seconds["encode"] - seconds["decode"]
        return Done(output, dict(seconds))
    handed = base(**common, **size, latents=noise, denoising_end=spec.handoff, output_type="latent").images
    middle, encoded = time.perf_counter(), seconds["encode"]
    images = refiner(**common, image=handed, denoising_start=spec.handoff, aesthetic_score=spec.aesthetic_score,
                     negative_aesthetic_score=spec.negative_aesthetic_score).images  # fmt: skip
    output = _pixels(images)
    seconds["base"] = middle - started - encoded
    seconds["refiner"] = time.perf_counter() - middle - (seconds["encode"] - encoded) - seconds["decode"]
    return Done(output, dict(seconds))


def _pixels(images: list[Any]) -> Array:
    return np.stack([np.asarray(image) for image in images])
