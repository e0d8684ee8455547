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
    if branch.kind == "LoRA" and "mid" not in tensors:
        down, up, matrix = _matrix(tensors["down"]), _matrix(tensors["up"]) * np.float32(factor), _matrix(weight)
        rows = max(1, _BLOCK // max(1, matrix.shape[1]))
        for start in range(0, len(matrix), rows):
            matrix[start : start + rows] += up[start : start + rows] @ down
        return
    weight += np.float32(factor) * _difference(branch, tensors).reshape(weight.shape)


def _difference(branch: Branch, tensors: Tensors) -> Weights:
    """Return the change of a weight, unscaled, for all but a LoRA of two factors."""
    if branch.kind == "difference":
        return tensors["diff"]
    if branch.kind == "LoRA":
        return _around(_matrix(tensors["up"]), tensors["mid"], _matrix(tensors["down"]))
    return {"LoHa": _loha, "LoKr": _lokr}[branch.kind](tensors)


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
    return _around(a.T, tensors[core], b)


def _around(up: Weights, core: Weights, down: Weights) -> Weights:
    """Return the product of up (out, i), core (i, j, *kernel) and down (j, in): (out, in, *kernel).

    The side that leaves fewer numbers is multiplied first. A file may state a huge i or j, which costs few bytes if the
    other one is small: multiplied from the other side, it would take hundreds of times the memory of file and weight.
    """
    (rows, columns, *kernel), outputs, inputs = core.shape, len(up), down.shape[1]
    up_first = outputs * columns < rows * inputs
    if up_first:
        core = (up @ _matrix(core)).reshape(outputs, columns, *kernel)
    product: Weights = np.einsum("ijkl,jr->irkl", core, down, optimize=True)
    return product if up_first else (up @ _matrix(product)).reshape(outputs, inputs, *kernel)
