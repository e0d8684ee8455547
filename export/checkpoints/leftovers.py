"""Tensors of a checkpoint that the model does not use: which are known, which can be ignored, which cannot."""

__all__ = ["known_extra", "left_out"]

import re
from collections.abc import Iterable

from sdxl_trt.engines import SourceError

# Tensors in published checkpoints that neither diffusers nor ComfyUI reads, each with its reason.
_KNOWN = (
    # Position ids: CLIP counts them itself, and casts to fp16 often damage the stored ones.
    r"(.+\.)?position_ids",
    # CLIP's temperature for comparing pictures with texts, which nobody does here.
    r"(.+\.)?logit_scale",
    # The first encoder's projection: SDXL uses only its hidden states. The second encoder's is in use, so never here.
    r"(.+\.)?text_projection(\.weight)?",
    # Averaged weights for further training; diffusers reads them only on request (extract_ema).
    r"(model_ema|first_stage_model\.model_ema)\..+",
    # The discriminator and the perceptual loss used in training.
    r"(loss|first_stage_model\.loss)\..+",
    # The training noise schedule as sgm and CompVis store it; it is rebuilt from the scheduler's config.
    r"denoiser\..+",
    r"(alphas|betas|lvlb|log_one_minus|posterior|sqrt)(_\w+)?|logvar",
)
_KNOWN_EXTRA = re.compile("|".join(f"(?:{line})" for line in _KNOWN))
# Words in the names of tensors that are added to, or multiplied with, the weights of a model.
_CHANGES = re.compile(
    r"(^|.*[._])(lora|loha|lokr|hada|dora|oft|boft|glora|ia3|diff|alpha|scales?|scaled|scaling|zero_points?|absmax|"
    r"quant\w*|qweight|packed|smooth\w*|svd\w*|adapter\w*|hypernet\w*|cond_proj)([._\d].*|$)",
    re.IGNORECASE,
)


def known_extra(name: str) -> bool:
    """Return whether `name` is a tensor that published files are known to contain and no model reads."""
    return _KNOWN_EXTRA.fullmatch(name) is not None


def left_out(extra: Iterable[str], used: Iterable[str], where: str) -> list[str]:
    """Return the `extra` tensors to warn of, sorted: all except those that published files are known to contain.

    Raises SourceError for a tensor that would change a used one: it is in a module that has `used` tensors of its own
    (a bias, a scale, a LoRA), or its name says so.
    """
    tensors = set(used)
    leaves = tensors | {name.rpartition(".")[0] for name in tensors} - {""}
    found = sorted(name for name in extra if not known_extra(name))
    for name in found:
        if _CHANGES.fullmatch(name) or any(name.startswith(f"{part}.") for part in _ancestors(name) if part in leaves):
            raise SourceError(
                f"{where}: the tensor {name} would change the model's weights in an unknown way; give a checkpoint"
                " without it, or with it merged"
            )
    return found


def _ancestors(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts)))
