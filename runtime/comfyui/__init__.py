"""ComfyUI workflows: reading them into requests, and writing requests as graphs."""

from typing import TYPE_CHECKING

from sdxl_trt.engines.lazy import lazy_names

if TYPE_CHECKING:
    from sdxl_trt.runtime.comfyui.checks import Experts, names_tiny, vae_stage
    from sdxl_trt.runtime.comfyui.loras import NO_FILES, LoraFiles
    from sdxl_trt.runtime.comfyui.node import Input, NodeKind
    from sdxl_trt.runtime.comfyui.nodes import NODES
    from sdxl_trt.runtime.comfyui.reader import read_workflow, workflow_of
    from sdxl_trt.runtime.comfyui.requests import (
        PictureFiles, blamed, check_workflow, load_channel, load_image, loaded_name, pair_request, part_of,
        sampling_request, settle_pair, with_seed,
    )
    from sdxl_trt.runtime.comfyui.workflow import (
        Decoded, Empty, Encoded, Image, LatentSource, Loaded, Mask, Masked, Output, Padded, Repeated, Resized, Sampled,
        Scaled, Workflow, ancestry, mask_sources, noise_mask,
    )
    from sdxl_trt.runtime.comfyui.writer import write_workflow
else:
    __getattr__ = lazy_names(__name__, {
        "checks": ("Experts", "names_tiny", "vae_stage"), "loras": ("NO_FILES", "LoraFiles"),
        "node": ("Input", "NodeKind"),
        "nodes": ("NODES",), "reader": ("read_workflow", "workflow_of"), "writer": ("write_workflow",),
        "requests": ("PictureFiles", "blamed", "check_workflow", "load_channel", "load_image", "loaded_name",
            "pair_request", "part_of", "sampling_request", "settle_pair", "with_seed"),
        "workflow": ("Decoded", "Empty", "Encoded", "Image", "LatentSource", "Loaded", "Mask", "Masked", "Output",
            "Padded", "Repeated", "Resized", "Sampled", "Scaled", "Workflow", "ancestry", "mask_sources", "noise_mask"),
    })

__all__ = [
    "NODES", "NO_FILES", "Decoded", "Empty", "Encoded", "Experts", "Image", "Input", "LatentSource", "Loaded",
    "LoraFiles", "Mask", "Masked", "NodeKind", "Output", "Padded", "PictureFiles", "Repeated", "Resized", "Sampled",
    "Scaled", "Workflow", "ancestry", "blamed", "check_workflow", "load_channel", "load_image", "loaded_name",
    "mask_sources", "names_tiny", "noise_mask", "pair_request", "part_of", "read_workflow", "sampling_request",
    "settle_pair", "vae_stage", "with_seed", "workflow_of", "write_workflow",
]
