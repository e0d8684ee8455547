"""What a single node states: a prompt, the size of a picture, the part of a schedule."""

__all__ = ["SIDES", "margins_of", "mixed", "prompt_count", "read_prompt", "sampled_part", "scaling"]

from dataclasses import replace
from typing import Any

from sdxl_trt.runtime.comfyui.node import Node
from sdxl_trt.runtime.comfyui.nodes import stated
from sdxl_trt.runtime.comfyui.workflow import Conditioning, Mix


def mixed(side: tuple[Conditioning, ...], mix: Mix) -> tuple[Conditioning, ...]:
    """Return the conditionings of a side, each with one more mix."""
    return tuple(replace(each, mixes=(*each.mixes, mix)) for each in side)


def prompt_count(conditioning: Conditioning) -> int:
    """Return how many prompts a conditioning is mixed from."""
    return 1 + sum(prompt_count(mix.other) for mix in conditioning.mixes if mix.other is not None)


def sampled_part(node: Node) -> dict[str, Any]:
    """Return the fields of a KSamplerAdvanced that say which steps it takes, and with what noise."""
    return {
        "add_noise": stated(node, "add_noise") == "enable",
        "start": stated(node, "start_at_step"),
        "end": stated(node, "end_at_step"),
        "leftover_noise": stated(node, "return_with_leftover_noise") == "enable",
    }


SIDES = ("left", "top", "right", "bottom")


def margins_of(node: Node) -> tuple[int, int, int, int]:
    """Return the pixels that a node adds on the left, the top, the right and the bottom."""
    left, top, right, bottom = (stated(node, side) for side in SIDES)
    return left, top, right, bottom


def scaling(node: Node) -> dict[str, Any]:
    """Return the fields that nodes scaling latents and nodes scaling images share."""
    common = {"method": stated(node, "upscale_method"), "node": node.id}
    if node.kind.endswith("By"):
        return {**common, "by": stated(node, "scale_by")}
    size = (stated(node, "width"), stated(node, "height"))
    return {**common, "size": size, "centred": stated(node, "crop") == "center"}


def read_prompt(node: Node) -> Conditioning:
    """Return the conditioning of a node that encodes text, without its CLIP."""
    if node.kind == "CLIPTextEncodeSDXL":
        sizes = [(stated(node, f"{of}height"), stated(node, f"{of}width")) for of in ("", "target_")]
        return Conditioning(
            node=node.id,
            text_g=stated(node, "text_g"),
            text_l=stated(node, "text_l"),
            original_size=sizes[0],
            crop=(stated(node, "crop_h"), stated(node, "crop_w")),
            target_size=sizes[1],
            encoder=node.kind,
        )
    text = stated(node, "text")
    if node.kind == "CLIPTextEncodeSDXLRefiner":
        size = (stated(node, "height"), stated(node, "width"))
        # A base that is prompted through this node uses the size as its target size too.
        return Conditioning(
            node.id, text, text, original_size=size, crop=(0, 0), target_size=size, score=stated(node, "ascore"),
            encoder=node.kind,
        )  # fmt: skip
    return Conditioning(node.id, text, text)
