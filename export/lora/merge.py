"""The formulas that merge a LoRA's tensors into a weight: LoRA, LoHa, LoKr, full differences and DoRA."""

__all__ = ["merge"]

from collections.abc import Mapping

import torch

from sdxl_trt.export.lora.kinds import Branch, magnitude_axis

Tensors = Mapping[str, torch.Tensor]


def merge(weight: torch.Tensor, branch: Branch, tensors: Tensors, scale: float) -> None:
    """Merge `branch` at `scale` into `weight` (out, in, *kernel), contiguous fp32, in place.

    `tensors` are the branch's parts in fp32. Without DoRA the result is weight + scale · scaling · difference. With
    DoRA, V is the weight plus the difference, and each program's files are merged as that program does:

    - LyCORIS and OneTrainer (``dora_scale``): V at full strength is rescaled to the file's norms; the result lies at
      `scale` between the weight and that, as in ComfyUI (`weight_decompose`). Norms per output are divided by V's, as
      in training and in the DoRA paper; ComfyUI divides them by the norms of the original weight.
    - peft (``magnitude``): V has the difference times `scale` and is always rescaled, as in diffusers' `fuse_lora`.
    """
    if "dora_scale" in tensors:
        before = weight.clone() if scale != 1 else None
        _add(weight, branch, tensors, branch.scaling)
        axis = magnitude_axis(branch, tuple(weight.shape))
        norms = torch.linalg.vector_norm(weight, dim=[d for d in range(weight.dim()) if d != axis], keepdim=True)
        weight.mul_(tensors["dora_scale"].reshape(norms.shape) / (norms + torch.finfo(torch.float32).eps))
        if before is not None:
            weight.sub_(before).mul_(scale).add_(before)
        return
    _add(weight, branch, tensors, scale * branch.scaling)
    if "magnitude" in tensors:
        norms = torch.linalg.vector_norm(weight, dim=list(range(1, weight.dim())), keepdim=True)
        weight.mul_(tensors["magnitude"].reshape(norms.shape) / norms)


def _add(weight: torch.Tensor, branch: Branch, tensors: Tensors, factor: float) -> None:
    if branch.kind == "LoRA":
        down = tensors["down"]
        if "mid" in tensors:
            down = torch.einsum("ijkl,jr->irkl", tensors["mid"], down.flatten(1))
        # addmm_ needs no difference of the weight's size in memory.
        weight.view(weight.shape[0], -1).addmm_(tensors["up"].flatten(1), down.flatten(1), alpha=factor)
        return
    difference = {"LoHa": _loha, "LoKr": _lokr}[branch.kind](tensors) if "diff" not in tensors else tensors["diff"]
    weight.add_(difference.reshape(weight.shape), alpha=factor)


def _loha(tensors: Tensors) -> torch.Tensor:
    first, second = (_product(tensors, f"hada_w{half}", f"hada_t{half}") for half in "12")
    return first.mul_(second)


def _lokr(tensors: Tensors) -> torch.Tensor:
    first, second = (_product(tensors, f"lokr_w{half}", f"lokr_t{half}") for half in "12")
    return torch.kron(first.reshape(*first.shape, *(1 for _ in second.shape[2:])), second.contiguous())


def _product(tensors: Tensors, name: str, core: str) -> torch.Tensor:
    """Return a tensor stored whole, as a @ b, or as a and b with a core between them (Tucker decomposition)."""
    if name in tensors:
        return tensors[name]
    a, b = tensors[f"{name}_a"], tensors[f"{name}_b"]
    return a @ b if core not in tensors else torch.einsum("ijkl,ip,jr->prkl", tensors[core], a, b)
