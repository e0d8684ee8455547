"""What a picture file says of its making: A1111's text for people, and the settings that a run is repeated from."""

__all__ = ["ImageSettings", "describe", "parse_settings", "read_settings"]

import json
import unicodedata
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from sdxl_trt.engines import UsageError
from sdxl_trt.runtime.images.files import PARAMETERS, SETTINGS, WORKFLOW, read_texts
from sdxl_trt.runtime.images.inputs import Fit
from sdxl_trt.runtime.images.provenance import BundleName

MAX_TEXT = 1 << 20
MAX_SETTINGS = 8 * MAX_TEXT
MOST_AXES = 2
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

Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
Name = Annotated[str, msgspec.Meta(max_length=100)]
Count = Annotated[int, msgspec.Meta(ge=1, le=100_000)]
Whole = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]
Pair = tuple[Whole, Whole]
Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Number = Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]


class ImageSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The settings of one picture, as its file states them; types, ranges and lengths are checked, no more.

    `handoff_step` None is the base alone; what only a refiner reads is then None too.
    """

    prompt: Text
    prompt_2: Text
    negative: Text | None
    negative_2: Text | None
    seed: Annotated[int, msgspec.Meta(ge=0)]
    steps: Count
    handoff_step: Whole | None
    guidance: Number
    refiner_guidance: Number | None
    guidance_rescale: Share
    guidance_interval: tuple[Share, Share]
    sampler: Name
    refiner_sampler: Name | None
    schedule: Name
    width: Count
    height: Count
    aesthetic_score: Number | None
    negative_aesthetic_score: Number | None
    injected_latents: bool
    tile: bool = False
    compat: Literal["diffusers", "comfyui"] = "diffusers"
    prediction_type: Literal["auto", "epsilon", "v_prediction", "sample"] = "auto"
    original_size: Pair | None = None
    crop: Pair = (0, 0)
    target_size: Pair | None = None
    clip_skip: Annotated[int, msgspec.Meta(ge=-1, le=1 << 20)] = 0
    base_end_step: Whole | None = None
    refiner_start_step: Whole | None = None
    refiner_add_noise: bool = False
    leftover_noise: bool | None = None
    count: Count | None = None
    """How many pictures were drawn from one stream of noise; None for a stream of its own."""
    image: Annotated[str, msgspec.Meta(max_length=255)] | None = None
    """The name of the file that it started from, "" for none; None where it started from noise."""
    image_sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")] | None = None
    fit: Fit | None = None
    """How it came to the size; "cover" where that was asked for."""
    strength: Share | None = None
    refine: bool = False
    """Whether the refiner alone changed the image."""
    workflow: bool = False
    """Whether a workflow asked for what these settings do not hold."""
    bundle: BundleName | None = None
    sweep: Annotated[tuple[Text, ...], msgspec.Meta(max_length=MOST_AXES)] = ()
    """A contact sheet's axes, as `--sweep` takes them. Its other settings are as they were asked for, None where one
    follows another; so are the handoffs, of which a single picture has only the step that they came to."""
    handoff: Share | Literal["auto"] | None = "auto"
    handoff_sigma: Number | None = None


def describe(metadata: Mapping[str, Any], graph: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Return the texts of a picture file: A1111's `parameters`, `metadata` as JSON, ComfyUI's `graph` if there is one.

    Both JSON texts are ASCII.
    """
    texts = {PARAMETERS: _parameters(metadata), SETTINGS: json.dumps(metadata)}
    return texts if graph is None else texts | {WORKFLOW: json.dumps(graph)}


def read_settings(path: Path) -> ImageSettings:
    """Return the settings that a picture file carries. Raises UsageError where it carries none, or broken ones."""
    text = read_texts(path).get(SETTINGS)
    if text is None:
        raise UsageError(f"--from {path}: the picture carries no settings; give one that trt-generate wrote")
    return parse_settings(text, str(path))


def parse_settings(text: str, where: str) -> ImageSettings:
    """Return the settings in a JSON text that nobody has vouched for. Raises UsageError, which calls it `where`."""
    if len(text) > MAX_SETTINGS:
        raise UsageError(f"--from {where}: its settings are longer than {MAX_SETTINGS >> 20} MiB; they are not ours")
    try:
        return msgspec.json.decode(text.encode(errors="replace"), type=ImageSettings)
    except (msgspec.DecodeError, RecursionError) as exc:
        raise UsageError(
            f"--from {where}: its settings cannot be read ({str(exc)[:200]}); another version wrote them, or they are"
            " broken"
        ) from exc


def _parameters(metadata: Mapping[str, Any]) -> str:
    """Return the text that A1111's web UI writes, whose names for samplers and grids are those of its menus."""
    bundle = metadata.get("bundle") or {}
    switch = _switch(metadata)
    # A1111's refiner comes after a base: one that ran alone is the model.
    alone = bool(metadata.get("refine"))
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
        "Sweep": _quoted(" x ".join(metadata.get("sweep", ()))),
    }
    lines = [_clean(metadata["prompt"])]
    if metadata["negative"]:
        lines.append(f"Negative prompt: {_clean(metadata['negative'])}")
    lines.append(", ".join(f"{name}: {fact}" for name, fact in facts.items() if fact != ""))
    return "\n".join(lines)


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
