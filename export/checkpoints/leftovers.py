"""Tensors of a checkpoint that the model has no place for: which are known, which can be left out, which cannot."""

__all__ = ["known_extra", "left_out"]

import re
from collections.abc import Iterable

from sdxl_trt.engines import SourceError

# What published checkpoints carry and neither diffusers nor ComfyUI reads, line by line.
_KNOWN = (
    # Which position is which: a count from 0 that CLIP makes for itself, often damaged by casts to fp16.
    r"(.+\.)?position_ids",
    # CLIP's temperature between pictures and texts; no picture is compared with a text here.
    r"(.+\.)?logit_scale",
    # The first encoder's projection: SDXL takes its hidden states only. The second encoder's is used, so not left over.
    r"(.+\.)?text_projection(\.weight)?",
    # Averaged weights for going on with the training; diffusers takes them only when asked (extract_ema).
    r"(model_ema|first_stage_model\.model_ema)\..+",
    # The discriminator and the perceptual loss of the training.
    r"(loss|first_stage_model\.loss)\..+",
    # The noise schedule of the training as sgm and CompVis store it; it is made anew from the scheduler's config.
    r"denoiser\..+",
    r"(alphas|betas|lvlb|log_one_minus|posterior|sqrt)(_\w+)?|logvar",
)
_KNOWN_EXTRA = re.compile("|".join(f"(?:{line})" for line in _KNOWN))
# Words in names of what is added to, or multiplied with, the weights of a model.
_CHANGES = re.compile(
    r"(^|.*[._])(lora|loha|lokr|hada|dora|oft|boft|glora|ia3|diff|alpha|scales?|scaled|scaling|zero_points?|absmax|"
    r"quant\w*|qweight|packed|smooth\w*|svd\w*|adapter\w*|hypernet\w*|cond_proj)([._\d].*|$)",
    re.IGNORECASE,
)


def known_extra(name: str) -> bool:
    """Return whether published files are known to carry a tensor `name` that no model reads."""
    return _KNOWN_EXTRA.fullmatch(name) is not None


def left_out(extra: Iterable[str], used: Iterable[str], where: str) -> list[str]:
    """Return those of the `extra` tensors that are to be told of, sorted: none that published files are known to carry.

    Raises SourceError for one that would change what is used: inside a module that has `used` tensors of its own (a
    bias, a scale, a LoRA), or of a name that says so.
    """
    tensors = set(used)
    leaves = tensors | {name.rpartition(".")[0] for name in tensors} - {""}
    found = sorted(name for name in extra if not known_extra(name))
    for name in found:
        if _CHANGES.fullmatch(name) or any(name.startswith(f"{part}.") for part in _ancestors(name) if part in leaves):
            raise SourceError(
                f"{where}: has a tensor {name}, which would change the model's weights and is not understood; give a"
                " checkpoint in which it is merged, or without it"
            )
    return found


def _ancestors(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts)))
