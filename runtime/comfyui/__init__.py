"""ComfyUI workflows: reading them into requests, and writing requests as graphs."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.runtime.comfyui.checks import Experts, vae_stage
    from sdxl_trt.runtime.comfyui.loras import NO_FILES, LoraFiles
    from sdxl_trt.runtime.comfyui.reader import read_workflow
    from sdxl_trt.runtime.comfyui.requests import (
        blamed, check_workflow, load_image, pair_request, part_of, sampling_request, settle_pair, with_seed,
    )
    from sdxl_trt.runtime.comfyui.workflow import (
        Decoded, Empty, Encoded, Image, LatentSource, Loaded, Output, Repeated, Resized, Sampled, Scaled, Workflow,
        ancestry,
    )
    from sdxl_trt.runtime.comfyui.writer import write_workflow
else:
    __getattr__ = lazy_names(__name__, {
        "checks": ("Experts", "vae_stage"),
        "loras": ("NO_FILES", "LoraFiles"),
        "reader": ("read_workflow",),
        "requests": (
            "blamed", "check_workflow", "load_image", "pair_request", "part_of", "sampling_request", "settle_pair",
            "with_seed",
        ),
        "workflow": (
            "Decoded", "Empty", "Encoded", "Image", "LatentSource", "Loaded", "Output", "Repeated", "Resized",
            "Sampled", "Scaled", "Workflow", "ancestry",
        ),
        "writer": ("write_workflow",),
    })

__all__ = [
    "NO_FILES", "Decoded", "Empty", "Encoded", "Experts", "Image", "LatentSource", "Loaded", "LoraFiles", "Output",
    "Repeated", "Resized", "Sampled", "Scaled", "Workflow", "ancestry", "blamed", "check_workflow", "load_image",
    "pair_request", "part_of", "read_workflow", "sampling_request", "settle_pair", "vae_stage", "with_seed",
    "write_workflow",
]
