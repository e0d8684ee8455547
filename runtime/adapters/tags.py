"""LoRAs in prompts, in the syntax of A1111's web UI: ``<lora:name:0.8>``.

Tags are found, split and removed as in its ``modules/extra_networks.py`` (parse_prompt, ExtraNetworkParams); the scales
are those of ``extensions-builtin/Lora/extra_networks_lora.py``: first the text encoders', then the UNet's. What that
code would ignore, a misspelled argument say, is an error here.
"""

__all__ = ["split_tags", "tags_of"]

import re

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.host import finite_number
from sdxl_trt.runtime.adapters.use import LoraUse

_TAG = re.compile(r"<(\w+):([^>]+)>")
_KINDS = ("lora", "lyco")
"""What A1111 loads as a LoRA, LyCORIS' kinds included."""
_NETWORKS = (*_KINDS, "hypernet")
"""What A1111 knows; other words between < and > are text here."""
_ANY = re.compile(rf"<(?:{'|'.join(_NETWORKS)}):[^>]*>?", re.IGNORECASE)
"""A tag, or one that does not end."""
_SYNTAX = "write <lora:NAME>, <lora:NAME:SCALE> or <lora:NAME:TE_SCALE:UNET_SCALE>"
_NAMED = ("te", "unet")
_MOST_PLAIN = 3
_SHOWN = 80


def tags_of(text: str) -> list[str]:
    """Return the tags in a text as they stand there, also broken ones and those that are not supported."""
    return [found[0] for found in _ANY.finditer(text)]


def split_tags(prompt: str) -> tuple[str, tuple[LoraUse, ...]]:
    """Return a prompt without its tags, and the LoRAs that they name, in their order.

    As in A1111, the text around a tag stays as it is, blanks included, and a scale that is not given is 1 on the text
    encoders, and theirs on the UNet. Raises UsageError for a tag that is broken, has an argument that is not supported
    (``dyn``, which changes the rank), or is not of a LoRA.
    """
    uses: list[LoraUse] = []

    def take(found: re.Match[str]) -> str:
        if found[1].lower() not in _NETWORKS:
            return found[0]
        uses.append(_use(found))
        return ""

    text = _TAG.sub(take, prompt)
    if broken := tags_of(text):
        raise UsageError(f"the prompt has {broken[0][:_SHOWN]!r} without a >; {_SYNTAX}")
    return text, tuple(uses)


def _use(found: re.Match[str]) -> LoraUse:
    tag, kind = found[0][:_SHOWN], found[1]
    if kind not in _KINDS:
        raise UsageError(f"the prompt has {tag!r}, which is not a LoRA; remove it, or {_SYNTAX}")
    plain: list[str] = []
    named: dict[str, str] = {}
    for item in found[2].split(":"):
        name, *value = item.split("=", 2)
        if len(value) == 1:
            named[name] = value[0]
        else:
            plain.append(item)
    if not plain or not plain[0]:
        raise UsageError(f"the prompt has {tag!r}, which names no file; {_SYNTAX}")
    if unknown := [name for name in named if name not in _NAMED] or ["dyn"] * (len(plain) > _MOST_PLAIN):
        raise UsageError(f"the prompt has {tag!r} with the argument {unknown[0]!r}, which is not supported; {_SYNTAX}")
    text_scale = _number(tag, named.get("te", plain[1] if len(plain) > 1 else "1"))
    stated = named.get("unet", plain[2] if len(plain) > 2 else None)
    scale = text_scale if stated is None else _number(tag, stated)
    return LoraUse(plain[0], scale, None if text_scale == scale else text_scale)


def _number(tag: str, text: str) -> float:
    number = finite_number(text)
    if number is None:
        raise UsageError(f"the prompt has {tag!r}, in which {text[:_SHOWN]!r} is not a finite number; {_SYNTAX}")
    return number
