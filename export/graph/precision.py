"""What a precision means for a module: the dtypes of its weights and arithmetic, and of its graph's inputs and outputs.

Sinusoidal embeddings of timesteps and time ids are computed in fp32 in every precision (their inputs are fp32, see
signatures.py). In half precision LayerNormalization and GroupNormalization accumulate in fp32 (the default of ONNX's
`stash_type`). Attention's `softmax_precision` stays unset: TensorRT's parser refuses graphs that set it and leaves the
choice to its kernels; ONNX Runtime's CPU provider returns the same bits with it set to fp32.
"""

__all__ = ["Casting", "boundary_dtype", "convert_module"]

from typing import Any

import torch
from torch import Tensor, nn

from sdxl_trt.export.graph.signatures import Graph

COMPUTE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "mixed": torch.float16}


def boundary_dtype(precision: str) -> torch.dtype:
    """Return the dtype of a graph's inputs and outputs, never bf16: numpy and ONNX Runtime's CPU provider lack it."""
    return torch.float16 if precision == "fp16" else torch.float32


def convert_module(graph: Graph, precision: str) -> torch.dtype:
    """Convert the module of `graph` to `precision` in place; return the dtype of its first layers' inputs.

    "mixed" is for autoencoder decoders: fp16, but fp32 from the second last upsampling to the end, where the published
    weights overflow (the layers that Olive's SDXL example keeps in fp32).
    """
    dtype = COMPUTE[precision]
    graph.module.to(dtype)
    if precision == "mixed":
        _widen_decoder(graph.module.model.decoder)
    return dtype


def _widen_decoder(decoder: Any) -> None:
    """Keep the end of a decoder in fp32; its first layer casts its inputs."""
    late = [decoder.up_blocks[-1], decoder.conv_norm_out, decoder.conv_out]
    entry = late[0]
    if len(decoder.up_blocks) > 1 and decoder.up_blocks[-2].upsamplers:
        entry = decoder.up_blocks[-2].upsamplers[0].conv
        late.append(entry)
    for part in late:
        part.float()
    entry.register_forward_pre_hook(_widen)


def _widen(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.float() if isinstance(value, Tensor) else value for value in inputs)


class Casting(nn.Module):
    """A module between casts, for a precision that differs from the graph's input and output dtype."""

    def __init__(self, graph: Graph, inside: torch.dtype, outside: torch.dtype) -> None:
        super().__init__()
        self.inner = graph.module
        self._casts = tuple(value.dtype is None for value in graph.inputs)
        self._inside, self._outside = inside, outside

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Cast the inputs without a fixed dtype, run the module, and cast every output."""
        given = [value.to(self._inside) if cast else value for value, cast in zip(inputs, self._casts, strict=True)]
        outputs = self.inner(*given)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(value.to(self._outside) for value in outputs)
