"""Scales of float8 weights: which tensor scales which weight, and which number of it scales which part.

Every supported convention means weight × scale, whatever its name suggests: ``scale_weight`` (ComfyUI's scaled_fp8,
``convert_old_quants`` and ``TensorCoreFP8Layout``), ``weight_scale`` (ComfyUI's later files; compressed-tensors'
``dequantize``), ``weight_scale_inv`` (transformers' ``_dequantize_fp8_weight``: the inverse of the factor used for
quantizing the weight) and ``scale`` (DeepSeek's ``weight_dequant``).
"""

__all__ = ["BLOCK", "FP8", "find_scales"]

import math
from collections.abc import Iterable, Mapping

from sdxl_trt.engines import SourceError
from sdxl_trt.export.checkpoints.tensor_info import Scale, TensorInfo

FP8 = ("F8_E4M3", "F8_E5M2")
_WEIGHT_SCALES = ("scale_weight", "weight_scale", "weight_scale_inv", "scale")
# Scales with which an fp8 engine rounds the inputs of a module: the weights and the function do not depend on them.
_INPUT_SCALES = ("scale_input", "input_scale", "activation_scale")
_SCALE_DTYPES = ("F32", "F16", "BF16")
_MARKER = "scaled_fp8"
_LAYER_MARK = "comfy_quant"
# The block size if the config states none: the default of DeepSeek, transformers and compressed-tensors.
BLOCK = (128, 128)
_REMEDY = "give the model in fp16 or fp32"


def find_scales(
    tensors: Mapping[str, TensorInfo], used: Iterable[str], where: str, block: tuple[int, int] | None = None
) -> tuple[dict[str, Scale], set[str]]:
    """Return the scales of the weights among `used`, and the names of all tensors that these scales account for.

    `block` is the block size from a config; if given, every fp8 weight must have a scale. Raises SourceError for a
    scale of uncertain meaning: its weight is not fp8, its shape fits no convention, or it is missing although other
    weights have one.
    """
    names = list(used)
    scales: dict[str, Scale] = {}
    consumed: set[str] = {_MARKER} & tensors.keys()
    for name in names:
        module, _, parameter = name.rpartition(".")
        beside = [f"{module}.{suffix}" for suffix in _WEIGHT_SCALES if f"{module}.{suffix}" in tensors]
        if parameter != "weight" or not beside:
            continue
        if len(beside) > 1:
            raise SourceError(f"{where}: {name} has two scales, {' and '.join(beside)}; {_REMEDY}")
        scales[name] = _scale(name, tensors[name], beside[0], tensors[beside[0]], where, block)
        others = (f"{module}.{suffix}" for suffix in (*_INPUT_SCALES, _LAYER_MARK))
        consumed |= {beside[0], *(other for other in others if other in tensors)}
    if scales or _MARKER in tensors or block is not None:
        bare = next((name for name in names if tensors[name].dtype in FP8 and name not in scales), None)
        if bare is not None:
            raise SourceError(f"{where}: the checkpoint scales its fp8 weights, but {bare} has no scale; {_REMEDY}")
    return scales, consumed


def _scale(
    name: str, weight: TensorInfo, scale_name: str, scale: TensorInfo, where: str, block: tuple[int, int] | None
) -> Scale:
    if weight.dtype not in FP8:
        raise SourceError(f"{where}: {scale_name} scales {name}, which is stored as {weight.dtype}; only fp8 weights"
                          f" are multiplied by their scales; {_REMEDY}")  # fmt: skip
    if scale.dtype not in _SCALE_DTYPES:
        raise SourceError(f"{where}: {scale_name} is stored as {scale.dtype}, like the scales of 4- and 8-bit block"
                          f" formats (MXFP8, NVFP4), which are not supported; {_REMEDY}")  # fmt: skip
    fits = _fit(weight.shape, scale.shape, block or BLOCK)
    whole = weight.rows is None and not weight.transposed
    if fits is None or not (whole or fits[0] == (1, 1)):
        raise SourceError(f"{where}: {scale_name} of shape {list(scale.shape)} does not fit {name} of shape"
                          f" {list(weight.shape)} in any known way; {_REMEDY}")  # fmt: skip
    return Scale(scale.file, scale.key, *fits)


def _fit(
    weight: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Return (grid, block) of a scale: per tensor, per row, or per block; None for any other shape."""
    if not weight or 0 in weight:
        return None
    rows, columns = weight[0], math.prod(weight[1:])
    if math.prod(scale) == 1:
        return (1, 1), (rows, columns)
    if scale[0] == rows and math.prod(scale) == rows:
        return (rows, 1), (1, columns)
    grid = (math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    return (grid, block) if len(weight) == 2 and scale == grid else None
