"""What the keys of LoRA files mean: a module of a component, and a part of the branch beside it."""

__all__ = [
    "COMPONENTS",
    "PEFT_ROOT",
    "Component",
    "Part",
    "foreign_format",
    "module_spellings",
    "place_module",
    "split_key",
]

from collections.abc import Mapping
from typing import Any, Literal

from sdxl_trt.export.ldm import unet_prefixes

Component = Literal["unet", "text_encoder", "text_encoder_2"]
Part = Literal["down", "up", "mid", "alpha"]
PEFT_ROOT = "base_model.model."
COMPONENTS: tuple[Component, ...] = ("unet", "text_encoder", "text_encoder_2")

_PARTS: dict[str, Part] = {
    # kohya's scripts and LyCORIS
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".lora_mid.weight": "mid",
    # peft, with and without the name that an adapter has in memory
    ".lora_A.weight": "down", ".lora_B.weight": "up",
    ".lora_A.default.weight": "down", ".lora_B.default.weight": "up",
    # diffusers before peft, and its attention processors before that ("to_q_lora.down.weight")
    ".lora.down.weight": "down", ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down", "_lora.up.weight": "up",
}  # fmt: skip
_ALPHA = ".alpha"
# The alpha of a module may be written after the name of its branch.
_BRANCHES = (*_PARTS, ".lora_linear_layer", ".lora", "_lora")

_FOREIGN = {
    ".dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", ".lokr_w": "LoKr", ".lokr_t": "LoKr", ".hada_": "LoHa",
    ".oft_": "OFT", ".boft_": "BOFT", "oft_blocks": "OFT", ".on_input": "IA3", ".ia3_l": "IA3", ".a1.weight": "GLoRA",
    ".b1.weight": "GLoRA", ".vera_lambda": "VeRA", ".w_norm": "norm weights", ".b_norm": "norm weights",
    "lora_controlnet": "Control LoRA", "lora_embedding_": "LoRA of token embeddings", "emb_params": "textual inversion",
    "string_to_param": "textual inversion", ".modules_to_save.": "whole modules", ".lora_B.bias": "LoRA with biases",
    ".lora_up.bias": "LoRA with biases", ".lora_A.bias": "LoRA with biases", ".lora_down.bias": "LoRA with biases",
}  # fmt: skip
_FOREIGN_ENDS = {(".diff", ".diff_b"): "full weight differences", (".set_weight", ".reshape_weight"): "set weights"}

# The module's dots are underscores after these; "lora_te_" is the one encoder of older models, SDXL's first.
_UNDERSCORED: dict[str, Component] = {
    "lora_unet_": "unet", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2", "lora_te_": "text_encoder",
}  # fmt: skip
_DOTTED: dict[str, Component] = {
    "unet.": "unet", "diffusion_model.": "unet", "text_encoder.": "text_encoder", "text_encoder_2.": "text_encoder_2",
}  # fmt: skip
# The first diffusers files held a UNet's attention processors and did not say so.
_UNET_ROOTS = {"add_embedding", "conv_in", "conv_out", "down_blocks", "mid_block", "time_embedding", "up_blocks"}
_OLD_UNET = {"to_out": "to_out.0"}
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def split_key(key: str) -> tuple[str, Part] | None:
    """Return the module that a key belongs to, spelled as in the file, and the part; None for no key of a LoRA."""
    if key.endswith(_ALPHA):
        module = key.removesuffix(_ALPHA)
        return module.removesuffix(next((end for end in _BRANCHES if module.endswith(end)), "")), "alpha"
    return next(((key.removesuffix(end), part) for end, part in _PARTS.items() if key.endswith(end)), None)


def foreign_format(key: str) -> str | None:
    """Return the name of the adapter format that `key` shows, if it is one that is no plain LoRA."""
    found = next((name for mark, name in _FOREIGN.items() if mark in key), None)
    return found or next((name for ends, name in _FOREIGN_ENDS.items() if key.endswith(ends)), None)


def place_module(spelled: str) -> tuple[Component, str] | None:
    """Return the component of a module of `split_key`, and the module's name without prefixes; None for no SDXL part.

    The name is one of those that `module_spellings` knows, if the file belongs to the base.
    """
    for prefix, component in _UNDERSCORED.items():
        if spelled.startswith(prefix):
            return component, spelled.removeprefix(prefix)
    bare = spelled.replace(PEFT_ROOT, "", 1)
    for prefix, component in _DOTTED.items():
        if bare.startswith(prefix):
            return component, _renew(bare.removeprefix(prefix), component)
    return ("unet", _renew(bare, "unet")) if bare.split(".")[0] in _UNET_ROOTS else None


def _renew(module: str, component: Component) -> str:
    """Return today's name of a module that is spelled with dots."""
    parent, dot, leaf = module.replace(".processor.", ".").rpartition(".")
    renamed = _OLD_UNET if component == "unet" else _OLD_TEXT
    return parent + dot + renamed.get(leaf, leaf)


def module_spellings(
    component: Component, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
) -> dict[str, str]:
    """Return {spelling of a module: published name of its weight} for every linear layer and convolution.

    `shapes` maps the published tensor names to shapes, `config` is the UNet's and serves the LDM names. A module of
    a UNet is spelled as in diffusers and as in LDM, one of an encoder with and without ``text_model.``, and each
    with dots and with underscores.
    """
    weights = {
        name.removesuffix(".weight"): name
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) in {2, 4}
    }
    dotted = dict(weights)
    if component == "unet":
        dotted |= {ldm: weights[module] for ldm, module in unet_prefixes(config).items() if module in weights}
    else:
        dotted |= {module.removeprefix("text_model."): name for module, name in weights.items()}
    return dotted | {module.replace(".", "_"): name for module, name in dotted.items()}
