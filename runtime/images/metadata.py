"""The texts of a picture file: A1111's parameters for people, settings as JSON, and ComfyUI's graph."""

__all__ = ["describe"]

import json
import unicodedata
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from sdxl_trt.runtime.images.files import PARAMETERS, SETTINGS, WORKFLOW

_SAMPLERS = {
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "dpm_2": "DPM2",
    "dpm_2_ancestral": "DPM2 a",
    "lms": "LMS",
    "dpmpp_2s_ancestral": "DPM++ 2S a",
    "dpmpp_sde": "DPM++ SDE",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "ddim": "DDIM",
    "uni_pc": "UniPC",
    "lcm": "LCM",
}
_SCHEDULES = {
    "karras": "Karras",
    "exponential": "Exponential",
    "lu": "Exponential",
    "beta": "Beta",
    "trailing": "Simple",
    "linspace": "Uniform",
    "normal": "Normal",
    "simple": "Simple",
    "sgm_uniform": "SGM Uniform",
    "ddim_uniform": "DDIM",
    "kl_optimal": "KL Optimal",
}
"""A1111's names of the grids that it has too; it has none for diffusers' `leading`."""

_PENULTIMATE = 2
"""A1111's number of the encoders' last layer but one, which SDXL takes."""
_A1111_STRONGEST = 0.999


def describe(metadata: Mapping[str, Any], graph: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Return the texts of a picture file: A1111's `parameters`, `metadata` as JSON, ComfyUI's `graph` if there is one.

    Both JSON texts are ASCII.
    """
    texts = {PARAMETERS: _parameters(metadata), SETTINGS: json.dumps(metadata)}
    return texts if graph is None else texts | {WORKFLOW: json.dumps(graph)}


def _parameters(metadata: Mapping[str, Any]) -> str:
    """Return the text that A1111's web UI writes, whose names for samplers and grids are those of its menus."""
    bundle = metadata.get("bundle") or {}
    switch = _switch(metadata)
    # A1111's refiner comes after a base: one that ran alone is the model.
    alone = bool(metadata.get("refine"))
    # A1111 has no LoRAs for the refiner alone.
    loras = metadata.get("loras", ())
    facts = {
        "Steps": metadata["steps"],
        "Sampler": _SAMPLERS.get(metadata["sampler"], metadata["sampler"]),
        "Schedule type": _schedule(metadata["schedule"]),
        "CFG scale": f"{metadata['guidance']:g}",
        "Seed": metadata["seed"],
        "Size": f"{metadata['width']}x{metadata['height']}",
        "Denoising strength": f"{metadata['strength']:g}" if "strength" in metadata else "",
        "Clip skip": _PENULTIMATE + metadata["clip_skip"] if metadata.get("clip_skip") else "",
        "Model": _quoted(bundle.get("refiner" if alone else "base") or ""),
        "Refiner": "" if alone else _quoted(bundle.get("refiner") or ""),
        "Refiner switch at": switch,
        "Refiner switch by sampling steps": bool(switch) or "",
        "Lora hashes": _quoted(", ".join(f"{_lora_name(each)}: {each['short_hash']}" for each in loras)),
        "Sweep": _quoted(" x ".join(metadata.get("sweep", ()))),
    }
    lines = [_clean("".join([metadata["prompt"], *map(_tag, loras)]))]
    if metadata["negative"]:
        lines.append(f"Negative prompt: {_clean(metadata['negative'])}")
    lines.append(", ".join(f"{name}: {fact}" for name, fact in facts.items() if fact != ""))
    return "\n".join(lines)


def _tag(lora: Mapping[str, Any]) -> str:
    """Return how A1111's prompt names a LoRA: with the text encoders' scale before the UNet's, if they differ."""
    scale, text_scale = lora["scale"], lora.get("text_scale")
    text_scale = scale if text_scale is None else text_scale
    both = f"{scale:g}" if scale == text_scale else f"{text_scale:g}:{scale:g}"
    return f" <lora:{_lora_name(lora)}:{both}>"


def _lora_name(lora: Mapping[str, Any]) -> str:
    """Return A1111's name of a LoRA, its file's without the ending, less what would end the name in its texts."""
    stem = lora["name"].removesuffix(".safetensors")
    return "".join(c for c in stem if c not in ":,>")


def _schedule(spacing: str) -> str:
    *_, last = spacing.split("+")
    return _SCHEDULES.get(last, "")


def _quoted(fact: str) -> str:
    """Return a fact as A1111 writes it: as JSON where the line would fall apart on it."""
    fact = _clean(fact).replace("\n", " ")
    return json.dumps(fact, ensure_ascii=False) if set(fact) & set(',:"') else fact


def _switch(metadata: Mapping[str, Any]) -> str:
    """Return the share of the sampling steps at which A1111 changes to the refiner at this very cut; "" for no cut.

    Its refiner takes the first step whose number, from 0, is at least that share of all steps (apply_refiner in
    modules/sd_samplers_common.py), if it is told to go by sampling steps: by default it goes by the noise. Its slider
    knows hundredths, so that the share with the fewest digits is taken that is above the step before, and above its
    second half, where a sampler of second order asks the model again.
    """
    step, steps = metadata["handoff_step"], metadata["steps"]
    if step is None:
        return ""
    if "strength" in metadata and metadata.get("compat", "diffusers") == "diffusers":
        # A1111 starts a picture one step earlier on the same grid (setup_img2img_steps).
        taken = int(min(metadata["strength"], _A1111_STRONGEST) * steps) + 1
        step, steps = step - (steps - taken), taken
    for digits in range(2, 20):
        share = Fraction(step * 10**digits // steps, 10**digits)
        if share > Fraction(2 * step - 1, 2 * steps):
            break
    return f"{float(share):.{digits}f}".rstrip("0").rstrip(".")


def _clean(text: str) -> str:
    """Return `text` without what a text chunk may not hold: control characters but line ends, lone surrogates."""
    return "".join(c for c in text if c == "\n" or unicodedata.category(c) not in ("Cc", "Cs"))
