"""A1111's text of a picture's settings, which its files and answers carry: written, and read from untrusted files."""

__all__ = ["info", "infotext", "parse_infotext"]

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sdxl_trt.engines.host import __version__
from sdxl_trt.runtime import Picture
from sdxl_trt.server.a1111.body import Asked, Model, Models

_FACT = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])*+"|[^,]*+)(?:,|$)')
_SIZE = re.compile(r"(\d{1,9})x(\d{1,9})", re.ASCII)
_LEAST = 3
"""A last line with fewer facts is a part of the prompt."""


def infotext(asked: Asked, models: Models, picture: Picture, *, unit: bool) -> str:
    """Return the text of one picture; `unit` says whether the first noise is that of sgm_noise_multiplier."""
    size = f"{picture.metadata['width']}x{picture.metadata['height']}"
    facts = {
        "Steps": asked.steps,
        "Sampler": asked.chosen.sampler.label,
        "Schedule type": asked.chosen.scheduler.label,
        "CFG scale": f"{asked.guidance:g}",
        "Seed": picture.seed,
        "Size": size,
        "Model hash": models.base.hash,
        "Model": models.base.model_name,
        **_started(asked),
        "RNG": "CPU",
        **_refined(asked, models.refiner),
        "Lora hashes": ", ".join(f"{lora['name']}: {lora['short_hash']}" for lora in picture.metadata.get("loras", ())),
        "SGM noise multiplier": unit or "",
        "Version": f"sdxl-trt {__version__}",
    }
    lines = [_clean(asked.prompt)]
    if asked.negative:
        lines.append(f"Negative prompt: {_clean(asked.negative)}")
    lines.append(", ".join(f"{name}: {_quoted(fact)}" for name, fact in facts.items() if fact != ""))
    return "\n".join(lines)


def _started(asked: Asked) -> dict[str, Any]:
    if asked.start is None:
        return {}
    found: dict[str, Any] = {"Denoising strength": f"{asked.start.strength:g}"}
    if asked.start.mask is not None:
        found["Mask blur"] = asked.start.mask.blur[0]
        if not asked.start.mask.whole:
            found |= {"Inpaint area": "Only masked", "Masked area padding": asked.start.mask.padding}
    return found


def _refined(asked: Asked, refiner: Model | None) -> dict[str, Any]:
    if not asked.refines or refiner is None:
        return {}
    at = "" if asked.switch_at is None else f"{asked.switch_at:g}"
    by_steps = asked.settings.refiner_switch_by_sample_steps or ""
    return {"Refiner": refiner.title.replace(".safetensors", ""), "Refiner switch at": at,
            "Refiner switch by sampling steps": by_steps}  # fmt: skip


def _quoted(fact: object) -> str:
    """Return a fact as A1111 writes it: as JSON where the line would fall apart on it."""
    text = _clean(str(fact))
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:"\n') else text


def _clean(text: str) -> str:
    """Return `text` without what a text chunk may not hold: control characters but line ends, lone surrogates."""
    return "".join(c for c in text if c == "\n" or unicodedata.category(c) not in ("Cc", "Cs"))


def info(asked: Asked, models: Models, pictures: Sequence[Picture], started: datetime, *, unit: bool) -> str:
    """Return the JSON text `info` of an answer; there may be no picture, if somebody interrupted it."""
    first = pictures[0] if pictures else None
    width, height = (first.metadata[side] if first else getattr(asked, side) for side in ("width", "height"))
    told = {
        "prompt": asked.prompt,
        "all_prompts": [asked.prompt] * len(pictures),
        "negative_prompt": asked.negative,
        "all_negative_prompts": [asked.negative] * len(pictures),
        "seed": first.seed if first else asked.seed,
        "all_seeds": [each.seed for each in pictures],
        "subseed": asked.seed,
        "all_subseeds": [each.seed for each in pictures],
        "subseed_strength": 0,
        "width": width,
        "height": height,
        "sampler_name": asked.chosen.sampler.label,
        "cfg_scale": asked.guidance,
        "steps": asked.steps,
        "batch_size": asked.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": models.base.model_name,
        "sd_model_hash": models.base.hash,
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": None if asked.start is None else asked.start.strength,
        "extra_generation_params": {"Schedule type": asked.chosen.scheduler.label, **_refined(asked, models.refiner)},
        "index_of_first_image": 0,
        "infotexts": [infotext(asked, models, each, unit=unit) for each in pictures],
        "styles": [],
        "job_timestamp": started.strftime("%Y%m%d%H%M%S"),
        "clip_skip": 1,
        "is_using_inpainting_conditioning": False,
        "version": f"sdxl-trt {__version__}",
    }
    return json.dumps(told)


def parse_infotext(text: str) -> dict[str, Any]:
    """Return the settings that an untrusted text of A1111 states, under its own names; sizes also as "Size-1", "-2"."""
    *lines, last = text.strip().split("\n")
    found = _FACT.findall(last)
    if len(found) < _LEAST:
        lines, found = [*lines, last], []
    prompt: list[str] = []
    negative: list[str] = []
    told = False
    for line in lines:
        told = told or line.startswith("Negative prompt:")
        (negative if told else prompt).append(line.strip().removeprefix("Negative prompt:").strip() if told else line)
    facts: dict[str, Any] = {"Prompt": "\n".join(prompt).strip(), "Negative prompt": "\n".join(negative).strip()}
    for name, value in found:
        facts |= _fact(name, _unquoted(value))
    return facts


def _fact(name: str, value: str) -> Mapping[str, str]:
    size = _SIZE.fullmatch(value)
    return {name: value} if size is None else {f"{name}-1": size[1], f"{name}-2": size[2]}


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value.strip()
    try:
        return str(json.loads(value))
    except ValueError:
        return value
