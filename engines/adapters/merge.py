"""The formulas that merge a LoRA's tensors into a weight: LoRA, LoHa, LoKr, full differences and DoRA."""

__all__ = ["merge"]

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines.adapters.kinds import Branch, magnitude_axis

Weights = NDArray[np.float32]
Tensors = Mapping[str, Weights]
# A difference is added in blocks of this many numbers, so that it needs little memory beside the weight.
_BLOCK = 1 << 20


def merge(weight: Weights, branch: Branch, tensors: Tensors, scale: float) -> None:
    """Merge `branch` at `scale` into `weight` (out, in, *kernel), contiguous fp32, in place.

    `tensors` are the branch's parts in fp32. Without DoRA the result is weight + scale · scaling · difference. With
    DoRA, V is the weight plus the difference, and each program's files are merged as that program does:

    - LyCORIS and OneTrainer (``dora_scale``): V at full strength is rescaled to the file's norms; the result lies at
      `scale` between the weight and that, as in ComfyUI (`weight_decompose`). Norms per output are divided by V's, as
      in training and in the DoRA paper; ComfyUI divides them by the norms of the original weight.
    - peft (``magnitude``): V has the difference times `scale` and is always rescaled, as in diffusers' `fuse_lora`.

    Sums beyond fp32 become infinite without a warning.
    """
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if "dora_scale" in tensors:
            before = weight.copy() if scale != 1 else None
            _add(weight, branch, tensors, branch.scaling)
            norms = _norms(weight, magnitude_axis(branch, weight.shape))
            weight *= tensors["dora_scale"].reshape(norms.shape) / (norms + np.finfo(np.float32).eps)
            if before is not None:
                weight -= before
                weight *= np.float32(scale)
                weight += before
            return
        _add(weight, branch, tensors, scale * branch.scaling)
        if "magnitude" in tensors:
            norms = _norms(weight, 0)
            weight *= tensors["magnitude"].reshape(norms.shape) / norms


def _norms(weight: Weights, axis: int | None) -> Weights:
    """Return the norms of a weight over all axes but `axis`, which stay as axes of length 1."""
    others = tuple(each for each in range(weight.ndim) if each != axis)
    norms: Weights = np.sqrt(np.square(weight).sum(axis=others, keepdims=True))
    return norms


def _add(weight: Weights, branch: Branch, tensors: Tensors, factor: float) -> None:
    if branch.kind == "LoRA":
        down = _matrix(tensors["down"])
        if "mid" in tensors:
            down = _matrix(np.einsum("ijkl,jr->irkl", tensors["mid"], down, optimize=True))
        up = _matrix(tensors["up"]) * np.float32(factor)
        matrix = _matrix(weight)
        rows = max(1, _BLOCK // max(1, matrix.shape[1]))
        for start in range(0, len(matrix), rows):
            matrix[start : start + rows] += up[start : start + rows] @ down
        return
    difference = {"LoHa": _loha, "LoKr": _lokr}[branch.kind](tensors) if "diff" not in tensors else tensors["diff"]
    weight += np.float32(factor) * difference.reshape(weight.shape)


def _matrix(tensor: Weights) -> Weights:
    """Return a contiguous tensor with all axes after the first in one, without a copy."""
    return tensor.reshape(len(tensor), -1)


def _loha(tensors: Tensors) -> Weights:
    first, second = (_product(tensors, f"hada_w{half}", f"hada_t{half}") for half in "12")
    return first * second


def _lokr(tensors: Tensors) -> Weights:
    first, second = (_product(tensors, f"lokr_w{half}", f"lokr_t{half}") for half in "12")
    product: Weights = np.kron(first.reshape(*first.shape, *(1 for _ in second.shape[2:])), second)
    return product


def _product(tensors: Tensors, name: str, core: str) -> Weights:
    """Return a tensor stored whole, as a @ b, or as a and b with a core between them (Tucker decomposition)."""
    if name in tensors:
        return tensors[name]
    a, b = tensors[f"{name}_a"], tensors[f"{name}_b"]
    if core not in tensors:
        return a @ b
    product: Weights = np.einsum("ijkl,ip,jr->prkl", tensors[core], a, b, optimize=True)
    return product
