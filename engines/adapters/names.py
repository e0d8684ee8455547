"""What the keys of LoRA files mean: a module of a component, and a part of the change to its weight."""

__all__ = [
    "COMPONENTS",
    "PEFT_ROOT",
    "LoraComponent",
    "Place",
    "adapter_name",
    "component_role",
    "embedding_name",
    "foreign_format",
    "module_spellings",
    "place_module",
    "split_key",
]

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sdxl_trt.engines.adapters.unet_names import unet_prefixes

LoraComponent = Literal["unet", "text_encoder", "text_encoder_2"]
PEFT_ROOT = "base_model.model."
COMPONENTS: tuple[LoraComponent, ...] = ("unet", "text_encoder", "text_encoder_2")

_PARTS = {
    # kohya's scripts and LyCORIS
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".lora_mid.weight": "mid",
    # peft, and files that omit the last word
    ".lora_A.weight": "down", ".lora_B.weight": "up", ".lora_A": "down", ".lora_B": "up",
    # diffusers before peft, and its attention processors before that ("to_q_lora.down.weight")
    ".lora.down.weight": "down", ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down", "_lora.up.weight": "up",
    # LyCORIS' other kinds, and its full differences of weights, biases and normalizations
    ".hada_w1_a": "hada_w1_a", ".hada_w1_b": "hada_w1_b", ".hada_w2_a": "hada_w2_a", ".hada_w2_b": "hada_w2_b",
    ".hada_t1": "hada_t1", ".hada_t2": "hada_t2",
    ".lokr_w1": "lokr_w1", ".lokr_w1_a": "lokr_w1_a", ".lokr_w1_b": "lokr_w1_b",
    ".lokr_w2": "lokr_w2", ".lokr_w2_a": "lokr_w2_a", ".lokr_w2_b": "lokr_w2_b", ".lokr_t2": "lokr_t2",
    ".diff": "diff", ".diff_b": "diff_b", ".w_norm": "diff", ".b_norm": "diff_b",
    # DoRA: LyCORIS and OneTrainer; peft
    ".dora_scale": "dora_scale",
    ".lora_magnitude_vector.weight": "magnitude", ".lora_magnitude_vector": "magnitude",
}  # fmt: skip
_ALPHA = ".alpha"
# The key of an alpha may contain the name of its branch before ".alpha".
_BRANCHES = (*(end for end, part in _PARTS.items() if part in {"down", "up", "mid"}), ".lora_linear_layer", ".lora",
             "_lora")  # fmt: skip
# peft's keys may contain the adapter's name in memory before the last word: ".lora_A.default.weight".
_ADAPTER = re.compile(r"(\.lora_(?:A|B|magnitude_vector))\.([^.]+)\.weight$")

_FOREIGN = {
    ".oft_": "OFT", ".boft_": "BOFT", "oft_blocks": "OFT", "oft_diag": "OFT", ".on_input": "IA3", ".ia3_l": "IA3",
    ".a1.weight": "GLoRA", ".a2.weight": "GLoRA", ".b1.weight": "GLoRA", ".b2.weight": "GLoRA", ".vera_lambda": "VeRA",
    ".lora_E": "AdaLoRA", "lora_controlnet": "Control LoRA", "lora_embedding_": "LoRA of token embeddings",
    "emb_params": "textual inversion", "string_to_param": "textual inversion", ".modules_to_save.": "whole modules",
    ".lora_B.bias": "LoRA with biases", ".lora_up.bias": "LoRA with biases", ".lora_A.bias": "LoRA with biases",
    ".lora_down.bias": "LoRA with biases", ".wd_for_diff": "DoRA of the difference",
}  # fmt: skip
_FOREIGN_ENDS = {(".set_weight", ".reshape_weight"): "set weights"}
_EMBEDDING = "bundle_emb."

# After these prefixes a module's dots are underscores; "lora_te_" is the only encoder of older models, SDXL's first.
_UNDERSCORED: dict[str, LoraComponent] = {
    "lora_unet_": "unet", "lycoris_": "unet", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder",
}  # fmt: skip
# Prefixes of encoders in ComfyUI, OneTrainer and diffusers; a prefix that extends another one comes first.
_DOTTED: dict[str, LoraComponent] = {
    "unet.": "unet", "diffusion_model.": "unet", "lora_unet.": "unet",
    "text_encoders.clip_l.transformer.": "text_encoder", "text_encoders.clip_g.transformer.": "text_encoder_2",
    "clip_l.transformer.": "text_encoder", "clip_g.transformer.": "text_encoder_2",
    "clip_l.": "text_encoder", "clip_g.": "text_encoder_2",
    "text_encoder.": "text_encoder", "text_encoder_2.": "text_encoder_2",
    "lora_te1.": "text_encoder", "lora_te2.": "text_encoder_2",
}  # fmt: skip
# Files for a UNet alone may have no prefix: diffusers' first ones, and some with LDM names.
_UNET_ROOTS = {
    "add_embedding", "conv_in", "conv_norm_out", "conv_out", "down_blocks", "mid_block", "time_embedding", "up_blocks",
    "input_blocks", "label_emb", "middle_block", "out", "output_blocks", "time_embed",
}  # fmt: skip
_OLD_UNET = {"to_out": "to_out.0"}
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass(frozen=True)
class Place:
    """A module of a component; `module` is its name without prefixes, `root` the file's prefix.

    Two roots of one module are two spellings of it.
    """

    component: LoraComponent
    module: str
    root: str


def component_role(name: str) -> LoraComponent | None:
    """Return what a bundle's component is to a LoRA: "unet" for refiner_unet, and for the shallow one of a UNet.

    None for what takes no LoRAs.
    """
    bare = name.removeprefix("refiner_").removesuffix("_shallow")
    return next((role for role in COMPONENTS if role == bare), None)


def split_key(key: str) -> tuple[str, str] | None:
    """Return (module, part) of a key, the module spelled as in the file; None if it is not a LoRA key.

    A part is "alpha" or a key of `Branch.parts`.
    """
    if key.endswith(_ALPHA):
        module = key.removesuffix(_ALPHA)
        return module.removesuffix(next((end for end in _BRANCHES if module.endswith(end)), "")), "alpha"
    plain = _ADAPTER.sub(r"\1.weight", key)
    return next(((plain.removesuffix(end), part) for end, part in _PARTS.items() if plain.endswith(end)), None)


def adapter_name(key: str) -> str | None:
    """Return the adapter's name in memory ("default_0") if `key` contains one."""
    found = _ADAPTER.search(key)
    return None if found is None else found[2]


def embedding_name(key: str) -> str | None:
    """Return the word of an embedding that OneTrainer bundles with a LoRA; None for any other key."""
    return key.removeprefix(_EMBEDDING).partition(".")[0] if key.startswith(_EMBEDDING) else None


def foreign_format(key: str) -> str | None:
    """Return the name of the adapter format of `key` if it is an unsupported one, else None."""
    found = next((name for mark, name in _FOREIGN.items() if mark in key), None)
    return found or next((name for ends, name in _FOREIGN_ENDS.items() if key.endswith(ends)), None)


def place_module(spelled: str) -> Place | None:
    """Return the place of a module from `split_key`; None if its prefix names no component of SDXL.

    If the file belongs to the base, the module's name is a key of `module_spellings`.
    """
    for prefix, component in _UNDERSCORED.items():
        if spelled.startswith(prefix):
            return Place(component, spelled.removeprefix(prefix), prefix)
    bare = spelled.replace(PEFT_ROOT, "", 1)
    peft = PEFT_ROOT if bare != spelled else ""
    for prefix, component in _DOTTED.items():
        if bare.startswith(prefix):
            return Place(component, _renew(bare.removeprefix(prefix), component), peft + prefix)
    return Place("unet", _renew(bare, "unet"), peft) if bare.split(".")[0] in _UNET_ROOTS else None


def _renew(module: str, component: LoraComponent) -> str:
    """Return the current name of a module spelled with dots."""
    parent, dot, leaf = module.replace(".processor.", ".").rpartition(".")
    renamed = _OLD_UNET if component == "unet" else _OLD_TEXT
    return parent + dot + renamed.get(leaf, leaf)


def module_spellings(
    component: LoraComponent, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
) -> dict[str, str]:
    """Return {spelling of a module: published name} for every module with a weight, normalizations included.

    `shapes` maps the published tensor names to shapes; `config` is the UNet's, needed for LDM names. A UNet's module
    has its diffusers and its LDM spelling, an encoder's one with and one without ``text_model.``, each with dots and
    with underscores.
    """
    modules = [name.removesuffix(".weight") for name in shapes if name.endswith(".weight")]
    dotted = dict(zip(modules, modules, strict=True))
    if component == "unet":
        known = set(modules)
        dotted |= {ldm: module for ldm, module in unet_prefixes(config).items() if module in known}
    else:
        dotted |= {module.removeprefix("text_model."): module for module in modules}
    return dotted | {spelling.replace(".", "_"): module for spelling, module in dotted.items()}
