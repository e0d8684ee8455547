"""Where a model comes from: a folder, a hub repository or a single file; and its configs."""

from sdxl_trt.export.sources.configs import PUBLISHED, read_json
from sdxl_trt.export.sources.controlnets import ControlNetSource, open_controlnet
from sdxl_trt.export.sources.roles import BASE_CLASS, INPAINT_CLASS, REFINER_CLASS, Role
from sdxl_trt.export.sources.source import (
    ModelSource, PipelineSource, open_source, open_tiny_vae, open_vae, with_tiny_vae, with_vae,
)  # fmt: skip
from sdxl_trt.export.sources.tokenizers import LoadedTokenizer, load_tokenizer, tokenizer_files
from sdxl_trt.export.sources.unets import open_unet, with_unet

__all__ = [
    "BASE_CLASS", "INPAINT_CLASS", "PUBLISHED", "REFINER_CLASS", "ControlNetSource", "LoadedTokenizer", "ModelSource",
    "PipelineSource", "Role", "load_tokenizer", "open_controlnet", "open_source", "open_tiny_vae", "open_unet",
    "open_vae", "read_json", "tokenizer_files", "with_tiny_vae", "with_unet", "with_vae",
]
