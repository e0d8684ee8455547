"""The supported nodes of ComfyUI: their inputs, the values each input accepts, and how it is used.

The reader checks values against this table, the editor's widgets are named from it, and docs/comfyui.md shows it.
Ranges, defaults and orders are those of ComfyUI's ``nodes.py`` and ``comfy_extras``.
"""

__all__ = ["DRAWN", "NODES", "PRIMITIVES", "SHOWN", "linked", "stated", "undeclared"]

import contextlib
from typing import Any

from sdxl_trt.engines import UsageError
from sdxl_trt.runtime.comfyui.node import REQUIRED, Input, Link, Node, NodeKind

MAX_TEXT = 1 << 20
MOST_NAMED = 3


def stated(node: Node, name: str) -> Any:
    """Return the value of an input as its type (int, float, bool or str), or its default if it is not given.

    As in ComfyUI, a number may be written as text, and a text as a number. Raises UsageError that names the node, for a
    value that is missing, of another type or outside ComfyUI's range, and for a link to a node that is not supported.
    """
    known = NODES[node.kind].input(name)
    value = node.inputs.get(name, known.default)
    if value is REQUIRED or value is None:
        raise UsageError(f"{node.place(name)} is missing; set it")
    if isinstance(value, Link):
        raise UsageError(f"{node}: {name} comes from node {value.node[:20]}, which is not supported; write the value"
                         f" into {name}")  # fmt: skip
    if known.type in ("INT", "FLOAT"):
        return _number(node, known, value)
    if known.type == "BOOLEAN":
        return _switch(node, known, value)
    if (
        not isinstance(value, str | int | float)
        or isinstance(value, bool)
        or len(str(value)[: MAX_TEXT + 1]) > MAX_TEXT
    ):
        raise UsageError(f"{node.place(name)} is not text, or longer than {MAX_TEXT >> 20} MiB")
    text = str(value)
    if known.choices and text not in known.choices:
        choices = ", ".join(known.choices)
        raise UsageError(f"{node.place(name)} {text[:60]!r} is not supported; choose one of: {choices}")
    return text


def _number(node: Node, known: Input, value: Any) -> int | float:
    kind = int if known.type == "INT" else float
    number: int | float | None = None
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        number = None if isinstance(value, bool) else kind(value)
    if number is None or (isinstance(value, float) and number != value):
        what = "whole number" if kind is int else "number"
        raise UsageError(f"{node.place(known.name)} {str(value)[:40]!r} is not a {what}; set one")
    if not known.low <= number <= known.high:
        raise UsageError(f"{node.place(known.name)} {str(number)[:40]} is outside {known.low} to {known.high}")
    return number


def _switch(node: Node, known: Input, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{node.place(known.name)} {str(value)[:40]!r} is neither true nor false; set one")
    return value


def linked(node: Node, name: str) -> Link:
    """Return the link that feeds an input. Raises UsageError if nothing is linked, as ComfyUI does."""
    value = node.inputs.get(name)
    if not isinstance(value, Link):
        raise UsageError(f"{node}: nothing is linked to {name}; link it")
    return value


def undeclared(node: Node) -> list[str]:
    """Return the warnings for the inputs of a node that are ignored: unknown ones, and those without effect."""
    kind = NODES[node.kind]
    names = {each.name for each in kind.inputs}
    strange = [name[:40] for name in node.inputs if name not in names]
    why: dict[str, list[str]] = {}
    if strange:
        more = ["and more"] if len(strange) > MOST_NAMED else []
        why["unknown input, ignored"] = strange[:MOST_NAMED] + more
    for each in kind.inputs:
        if each.unread and (each.default is not None or each.name in node.inputs):
            why.setdefault(each.unread, []).append(f"{each.name} {str(node.inputs.get(each.name, each.default))[:40]}")
    return [f"{node}: {', '.join(names)}: {reason}" for reason, names in why.items()]


_MOST_PIXELS = 16384
_MOST_SEED = 2**64 - 1
_METHODS = ("nearest-exact", "bilinear", "area", "bicubic")
_CROP = Input("crop", "CHOICE", "disabled", choices=("disabled", "center"))
_TILES = "ignored: tiles here have a size and an overlap of their own, and differ from ComfyUI's at their seams"
_TILING = (
    Input("tile_size", "INT", 512, 64, 4096, followed="ignored with a warning: tiles here differ", unread=_TILES),
    Input("overlap", "INT", 64, 0, 4096, followed="ignored with a warning: tiles here differ", unread=_TILES),
    Input("temporal_size", "INT", 64, 8, 4096, followed="for videos: ignored with a warning", unread=_TILES),
    Input("temporal_overlap", "INT", 8, 4, 4096, followed="for videos: ignored with a warning", unread=_TILES),
)
_SAMPLER_NAMES = Input("sampler_name", "STRING", followed="the supported samplers; others are refused")
_SCHEDULER = Input("scheduler", "STRING", followed="all nine of ComfyUI's; others are refused")
_MODEL_AND_SIDES = (Input("model", "MODEL"), Input("positive", "CONDITIONING"), Input("negative", "CONDITIONING"))
_MARGINS = tuple(Input(name, "INT", 0, low=0, high=_MOST_PIXELS) for name in ("left", "top", "right", "bottom"))

NODES: dict[str, NodeKind] = {
    "CheckpointLoaderSimple": NodeKind(
        (Input("ckpt_name", "STRING", followed="replaced by the bundle's base or refiner, with a warning if the names"
                                               " differ"),),
        ("MODEL", "CLIP", "VAE"),
    ),
    "VAELoader": NodeKind(
        (Input("vae_name", "STRING", followed="taesdxl: the bundle's tiny decoder, if it has one; others are"
                                              " replaced by its autoencoder, with a warning if the names differ"),),
        ("VAE",),
    ),
    "LoraLoader": NodeKind(
        (
            Input("model", "MODEL"), Input("clip", "CLIP"),
            Input("lora_name", "STRING", followed="a file in `--lora-dir`, or one that the bundle has fused"),
            Input("strength_model", "FLOAT", 1.0, -100, 100, followed="as in ComfyUI; the bundle's, if it is fused"),
            Input("strength_clip", "FLOAT", 1.0, -100, 100,
                  followed="as in ComfyUI; the bundle's on the encoders, if it is fused"),
        ),
        ("MODEL", "CLIP"),
    ),
    "LoraLoaderModelOnly": NodeKind(
        (
            Input("model", "MODEL"),
            Input("lora_name", "STRING", followed="a file in `--lora-dir`, or one that the bundle has fused with"
                                                   " strength 0 on the encoders"),
            Input("strength_model", "FLOAT", 1.0, -100, 100, followed="as in ComfyUI; the bundle's, if it is fused"),
        ),
        ("MODEL",),
    ),
    "CLIPSetLastLayer": NodeKind(
        (Input("clip", "CLIP"), Input("stop_at_clip_layer", "INT", -1, -24, -1, followed="-2 is SDXL's own")), ("CLIP",)
    ),
    "CLIPTextEncode": NodeKind((Input("clip", "CLIP"), Input("text", "STRING")), ("CONDITIONING",)),
    "CLIPTextEncodeSDXL": NodeKind(
        (
            Input("clip", "CLIP"),
            *(Input(name, "INT", 1024, low=0, high=_MOST_PIXELS) for name in ("width", "height")),
            *(Input(name, "INT", 0, low=0, high=_MOST_PIXELS) for name in ("crop_w", "crop_h")),
            *(Input(name, "INT", 1024, low=0, high=_MOST_PIXELS) for name in ("target_width", "target_height")),
            Input("text_g", "STRING"), Input("text_l", "STRING"),
        ),
        ("CONDITIONING",),
    ),
    "CLIPTextEncodeSDXLRefiner": NodeKind(
        (
            Input("ascore", "FLOAT", 6.0, 0, 1000), Input("width", "INT", 1024, low=0, high=_MOST_PIXELS),
            Input("height", "INT", 1024, low=0, high=_MOST_PIXELS), Input("text", "STRING"), Input("clip", "CLIP"),
        ),
        ("CONDITIONING",),
    ),
    "ConditioningZeroOut": NodeKind((Input("conditioning", "CONDITIONING"),), ("CONDITIONING",)),
    "ConditioningCombine": NodeKind(
        (Input("conditioning_1", "CONDITIONING"), Input("conditioning_2", "CONDITIONING")), ("CONDITIONING",)
    ),
    "ConditioningConcat": NodeKind(
        (Input("conditioning_to", "CONDITIONING"), Input("conditioning_from", "CONDITIONING")), ("CONDITIONING",)
    ),
    "ConditioningAverage": NodeKind(
        (
            Input("conditioning_to", "CONDITIONING"), Input("conditioning_from", "CONDITIONING"),
            Input("conditioning_to_strength", "FLOAT", 1.0, 0, 1),
        ),
        ("CONDITIONING",),
    ),
    "ControlNetLoader": NodeKind(
        (Input("control_net_name", "STRING", followed="must be in the bundle, under its file name"),), ("CONTROL_NET",)
    ),
    "ControlNetApply": NodeKind(
        (
            Input("conditioning", "CONDITIONING"), Input("control_net", "CONTROL_NET"), Input("image", "IMAGE"),
            Input("strength", "FLOAT", 1.0, 0, 10),
        ),
        ("CONDITIONING",),
    ),
    "ControlNetApplyAdvanced": NodeKind(
        (
            Input("positive", "CONDITIONING"), Input("negative", "CONDITIONING"), Input("control_net", "CONTROL_NET"),
            Input("image", "IMAGE"), Input("strength", "FLOAT", 1.0, 0, 10), Input("start_percent", "FLOAT", 0.0, 0, 1),
            Input("end_percent", "FLOAT", 1.0, 0, 1),
            Input("vae", "VAE", None, followed="ignored with a warning: only ControlNets of other models read it",
                  unread="ignored: ControlNets of SDXL read no autoencoder"),
        ),
        ("CONDITIONING", "CONDITIONING"),
    ),
    "EmptyLatentImage": NodeKind(
        (
            Input("width", "INT", 512, 16, 16384), Input("height", "INT", 512, 16, 16384),
            Input("batch_size", "INT", 1, 1, 4096),
        ),
        ("LATENT",),
    ),
    "RepeatLatentBatch": NodeKind((Input("samples", "LATENT"), Input("amount", "INT", 1, 1, 64)), ("LATENT",)),
    "LatentUpscale": NodeKind(
        (
            Input("samples", "LATENT"), Input("upscale_method", "CHOICE", choices=(*_METHODS, "bislerp")),
            *(Input(name, "INT", 512, low=0, high=_MOST_PIXELS) for name in ("width", "height")), _CROP,
        ),
        ("LATENT",),
    ),
    "LatentUpscaleBy": NodeKind(
        (
            Input("samples", "LATENT"), Input("upscale_method", "CHOICE", choices=(*_METHODS, "bislerp")),
            Input("scale_by", "FLOAT", 1.5, 0.01, 8.0),
        ),
        ("LATENT",),
    ),
    "VAEEncode": NodeKind((Input("pixels", "IMAGE"), Input("vae", "VAE")), ("LATENT",)),
    "VAEEncodeTiled": NodeKind((Input("pixels", "IMAGE"), Input("vae", "VAE"), *_TILING), ("LATENT",)),
    "VAEEncodeForInpaint": NodeKind(
        (
            Input("pixels", "IMAGE"), Input("vae", "VAE"), Input("mask", "MASK"),
            Input("grow_mask_by", "INT", 6, 0, 64),
        ),
        ("LATENT",),
    ),
    "SetLatentNoiseMask": NodeKind((Input("samples", "LATENT"), Input("mask", "MASK")), ("LATENT",)),
    "InpaintModelConditioning": NodeKind(
        (
            *_MODEL_AND_SIDES[1:], Input("vae", "VAE"), Input("pixels", "IMAGE"), Input("mask", "MASK"),
            Input("noise_mask", "BOOLEAN", default=True),
        ),
        ("CONDITIONING", "CONDITIONING", "LATENT"),
    ),
    "KSampler": NodeKind(
        (
            Input("model", "MODEL"), Input("seed", "INT", low=0, high=_MOST_SEED), Input("steps", "INT", 20, 1, 10_000),
            Input("cfg", "FLOAT", 8.0, 0, 100), _SAMPLER_NAMES, _SCHEDULER, *_MODEL_AND_SIDES[1:],
            Input("latent_image", "LATENT"), Input("denoise", "FLOAT", 1.0, 0, 1),
        ),
        ("LATENT",),
        button="seed",
    ),
    "KSamplerAdvanced": NodeKind(
        (
            Input("model", "MODEL"), Input("add_noise", "CHOICE", "enable", choices=("enable", "disable")),
            Input("noise_seed", "INT", low=0, high=_MOST_SEED), Input("steps", "INT", 20, 1, 10_000),
            Input("cfg", "FLOAT", 8.0, 0, 100), _SAMPLER_NAMES, _SCHEDULER, *_MODEL_AND_SIDES[1:],
            Input("latent_image", "LATENT"), Input("start_at_step", "INT", 0, 0, 10_000),
            Input("end_at_step", "INT", 10_000, 0, 10_000),
            Input("return_with_leftover_noise", "CHOICE", "disable", choices=("disable", "enable")),
        ),
        ("LATENT",),
        button="noise_seed",
    ),
    "VAEDecode": NodeKind((Input("samples", "LATENT"), Input("vae", "VAE")), ("IMAGE",)),
    "VAEDecodeTiled": NodeKind((Input("samples", "LATENT"), Input("vae", "VAE"), *_TILING), ("IMAGE",)),
    "LoadImage": NodeKind(
        (Input("image", "STRING", followed="a file in the workflow's folder"),), ("IMAGE", "MASK"), button="image"
    ),
    "LoadImageMask": NodeKind(
        (
            Input("image", "STRING", followed="a file in the workflow's folder"),
            Input("channel", "CHOICE", choices=("alpha", "red", "green", "blue")),
        ),
        ("MASK",),
        button="channel",
    ),
    "ImageToMask": NodeKind(
        (
            Input("image", "IMAGE", followed="a loaded picture; of a sampled one it is refused"),
            Input("channel", "CHOICE", choices=("red", "green", "blue")),
        ),
        ("MASK",),
    ),
    "SolidMask": NodeKind(
        (
            Input("value", "FLOAT", 1.0, 0, 1), Input("width", "INT", 512, 1, _MOST_PIXELS),
            Input("height", "INT", 512, 1, _MOST_PIXELS),
        ),
        ("MASK",),
    ),
    "InvertMask": NodeKind((Input("mask", "MASK"),), ("MASK",)),
    "GrowMask": NodeKind(
        (
            Input("mask", "MASK"), Input("expand", "INT", 0, -_MOST_PIXELS, _MOST_PIXELS),
            Input("tapered_corners", "BOOLEAN", default=True),
        ),
        ("MASK",),
    ),
    "FeatherMask": NodeKind((Input("mask", "MASK"), *_MARGINS), ("MASK",)),
    "ImagePadForOutpaint": NodeKind(
        (Input("image", "IMAGE"), *_MARGINS, Input("feathering", "INT", 40, 0, _MOST_PIXELS)), ("IMAGE", "MASK")
    ),
    "ImageScale": NodeKind(
        (
            Input("image", "IMAGE"), Input("upscale_method", "CHOICE", choices=(*_METHODS, "lanczos")),
            *(Input(name, "INT", 512, low=0, high=_MOST_PIXELS) for name in ("width", "height")), _CROP,
        ),
        ("IMAGE",),
    ),
    "ImageScaleBy": NodeKind(
        (
            Input("image", "IMAGE"), Input("upscale_method", "CHOICE", choices=(*_METHODS, "lanczos")),
            Input("scale_by", "FLOAT", 1.0, 0.01, 8.0),
        ),
        ("IMAGE",),
    ),
    "SaveImage": NodeKind(
        (
            Input("images", "IMAGE"),
            Input("filename_prefix", "STRING", "ComfyUI", followed="the file's name, if -o is not given"),
        ),
        (),
    ),
    "PreviewImage": NodeKind((Input("images", "IMAGE"),), ()),
    "PrimitiveInt": NodeKind((Input("value", "INT", low=0, high=_MOST_SEED),), ("INT",), button="value"),
    **{name: NodeKind((Input("value", kind),), (kind,)) for name, kind in (
        ("PrimitiveFloat", "FLOAT"), ("PrimitiveString", "STRING"), ("PrimitiveStringMultiline", "STRING"))},
}  # fmt: skip
"""The supported node classes. An input without a default must be given."""

PRIMITIVES = ("PrimitiveInt", "PrimitiveFloat", "PrimitiveString", "PrimitiveStringMultiline")
DRAWN, SHOWN = "SaveImage", "PreviewImage"
"""The node whose pictures are saved, and the node whose pictures are previewed."""
