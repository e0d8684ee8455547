"""Weight files: their tensors, names, dtypes and quantization scales."""

from sdxl_trt.export.checkpoints.checkpoint import (
    REMAP_BYTES, Checkpoint, digest_tensors, open_checkpoint, open_file, resolve_names,
)
from sdxl_trt.export.checkpoints.ldm import controlnet_prefixes, open_clip_prefixes, vae_prefixes
from sdxl_trt.export.checkpoints.leftovers import left_out
from sdxl_trt.export.checkpoints.quantization import check_header, read_quantization, unquantized
from sdxl_trt.export.checkpoints.tensor_info import TensorInfo
from sdxl_trt.export.checkpoints.weight_files import find_weights, shard_names

__all__ = [
    "REMAP_BYTES", "Checkpoint", "TensorInfo", "check_header", "controlnet_prefixes", "digest_tensors",
    "find_weights", "left_out", "open_checkpoint", "open_clip_prefixes", "open_file", "read_quantization",
    "resolve_names", "shard_names", "unquantized", "vae_prefixes",
]
