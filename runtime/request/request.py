"""A request: each of its settings is declared here once, and options, ranges, records and the schema are derived.

Importing this loads no numpy: ``--help`` is made of it.
"""

__all__ = ["COMFYUI_SCHEDULES", "GROUPS", "MAX_SEED", "SAMPLERS", "Request", "parse_size"]

from typing import TYPE_CHECKING, Any, Literal

from sdxl_trt.engines import UsageError
from sdxl_trt.runtime.adapters import LoraUse, parse_use
from sdxl_trt.runtime.controls import parse_control
from sdxl_trt.runtime.request.settings import dataclass_of_settings, setting

if TYPE_CHECKING:
    from dataclasses import dataclass
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from sdxl_trt.runtime.controls import ControlUse
    from sdxl_trt.runtime.images import InputMask, InputPicture
    from sdxl_trt.runtime.request.side import Side
else:

    def dataclass(*, frozen: bool) -> Any:  # noqa: ARG001 - it always is
        return dataclass_of_settings


# Stated again here, since --help must not wait for numpy; a test compares them with the samplers and schedules.
SAMPLERS = (
    "euler", "heun", "dpm_2", "lms", "dpmpp_2m", "ddim", "uni_pc", "deis", "res_multistep", "euler_ancestral",
    "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "lcm",
)  # fmt: skip
COMFYUI_SCHEDULES = (
    "simple", "sgm_uniform", "karras", "exponential", "ddim_uniform", "beta", "normal", "linear_quadratic",
    "kl_optimal",
)  # fmt: skip
_OTHER_SCHEDULES = ", ".join(name for name in COMFYUI_SCHEDULES if name != "normal")
GROUPS = (
    "prompt and picture", "denoising", "starting from a picture", "series and repeats", "as in ComfyUI", "engines"
)  # fmt: skip
"""The groups of options in ``--help``."""
_PICTURE, _DENOISING, _START, _, _COMFYUI, _ENGINES = GROUPS
MAX_SEED = 2**64 - 1
MAX_SIZE = 1 << 20
"""More than any original size of a picture; float32 holds every whole number up to it."""


def _fraction_or_none(text: str) -> float | str | None:
    if text in ("auto", "none"):
        return "auto" if text == "auto" else None
    try:
        return float(text)
    except ValueError as exc:
        raise UsageError(f"{text!r} is neither a fraction between 0 and 1 nor none") from exc


def _interval(text: str) -> tuple[float, float]:
    first, _, last = text.partition(":")
    try:
        return float(first), float(last)
    except ValueError as exc:
        raise UsageError(f"{text!r}: give two fractions of the steps, 0.1:0.8 say") from exc


def parse_size(text: str) -> tuple[int, int]:
    """Return (height, width) of ``WxH``. Raises UsageError."""
    width, _, height = text.lower().partition("x")
    try:
        return int(height), int(width)
    except ValueError as exc:
        raise UsageError(f"{text!r}: give width and height in pixels, 1024x768 say") from exc


def _corner(text: str) -> tuple[int, int]:
    """Return (top, left) of ``X,Y``."""
    left, _, top = text.partition(",")
    try:
        return int(top), int(left)
    except ValueError as exc:
        raise UsageError(f"{text!r}: give the left and the top in pixels, 0,128 say") from exc


def _margins(text: str) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of ``L,T,R,B``."""
    try:
        left, top, right, bottom = map(int, text.split(","))
    except ValueError as exc:
        raise UsageError(f"{text!r}: give the pixels to add on the left, top, right and bottom, 0,0,64,0 say") from exc
    return left, top, right, bottom


def _side(side: int, number: str) -> Any:
    """Return how a record finds a micro-condition that only a refiner reads."""
    return lambda resolved: getattr(resolved.sides["refiner"][side].micro, number) if resolved.uses_refiner else None


@dataclass(frozen=True)
class Request:
    """What a user requests. None takes the default that fits the bundle; sizes are (height, width), crops (top, left).

    Picture i has seed `seed` + i; in ComfyUI's way all pictures are a batch of one seed. Positions on the schedule are
    steps from the noisy end. Give one of the handoffs, or with ComfyUI's freedom the end of the base and the start of
    the refiner; if only one of these two is given, it is the other's too.
    """

    prompt: str = setting(
        "", help="what the picture shows", unstated=True, record="always",
        resolved=lambda resolved: resolved.prompt.text,
    )  # fmt: skip
    prompt_2: str | None = setting(
        None, help="prompt of the second text encoder (default: the prompt)", group=_PICTURE, metavar="TEXT",
        record="always", follows="prompt", resolved=lambda resolved: resolved.prompt.text_2,
    )  # fmt: skip
    negative: str | None = setting(
        None, record_none=True, help='negative prompt; leaving it out is not the same as ""', group=_PICTURE,
        metavar="TEXT", record="always", resolved=lambda resolved: resolved.negative and resolved.negative.text,
    )  # fmt: skip
    negative_2: str | None = setting(
        None, record_none=True, help="negative prompt of the second text encoder", group=_PICTURE, metavar="TEXT",
        record="always", follows="negative", resolved=lambda resolved: resolved.negative and resolved.negative.text_2,
    )  # fmt: skip
    seed: int | None = setting(
        None, node="the seed", help="0 to 2^64-1 (default: drawn and printed)", low=0, high=MAX_SEED, group=_PICTURE,
        metavar="N", record="always", workflow="replaces", sweep="whole numbers",
    )  # fmt: skip
    steps: int = setting(
        30, node="steps", model_range=True, help="steps of base and refiner together (30)", unit="steps", low=1,
        group=_DENOISING, metavar="N", record="always", sweep="whole numbers", on_sheet=True,
    )  # fmt: skip
    handoff: float | Literal["auto"] | None = setting(
        "auto", help="fraction of the noise range that the base denoises; none: the base alone (default 0.8)",
        unit="fraction", low=0, high=1, without="both", group=_DENOISING, metavar="F|none", parse=_fraction_or_none,
        advice="choose a fraction between 0 and 1 (0.8 is usual), or none", exclusive="handoff", stage="handoff",
        sweep="fractions between 0 and 1, and none for the base alone", sweeps_none=True, on_sheet=True, record="own",
    )  # fmt: skip
    """diffusers' denoising_end and denoising_start; "auto" is 0.8 if the bundle has a refiner."""
    handoff_step: int | None = setting(
        None, record_none=True, low=0, model_range=True, help="hand over after K steps", unit="steps",
        group=_DENOISING, metavar="K", exclusive="handoff", stage="handoff",
        sweep="whole numbers of steps, and none for the base alone", sweeps_none=True, on_sheet=True, record="always",
        repeats=False,
        resolved=lambda resolved: resolved.cut if resolved.uses_refiner and not resolved.refiner_only else None,
    )  # fmt: skip
    handoff_sigma: float | None = setting(
        None, help="hand over at the first sigma at or below S", unit="sigma", low=0, without="low", group=_DENOISING,
        metavar="S", advice="give a positive number", exclusive="handoff", stage="handoff", on_sheet=True,
        record="own",
    )  # fmt: skip
    guidance: float = setting(
        5.0, node="cfg", help="classifier-free guidance scale (5.0)", group=_DENOISING, metavar="G", record="always",
        sweep="numbers", on_sheet=True,
    )  # fmt: skip
    refiner_guidance: float | None = setting(
        None, node="cfg", record_none=True, help="guidance scale of the refiner (default: the base's)",
        group=_DENOISING, metavar="G", record="always", stage="refiner", follows="guidance", sweep="numbers",
        on_sheet=True, resolved=lambda resolved: resolved.refiner_guidance if resolved.uses_refiner else None,
    )  # fmt: skip
    guidance_rescale: float = setting(
        0.0, help="0 to 1: reduce the contrast that guidance adds (0)", low=0, high=1, group=_DENOISING, metavar="R",
        record="always", workflow="beside",
    )  # fmt: skip
    guidance_interval: tuple[float, float] = setting(
        (0.0, 1.0), help="guide these steps only, as fractions (0:1); the others cost half", unit="fraction", low=0,
        high=1, group=_DENOISING, metavar="LO:HI", parse=_interval, record="always", workflow="beside",
        advice="give two fractions of the steps in rising order", several_runs=False,
    )  # fmt: skip
    sampler: str = setting(
        "auto", node="sampler_name", longest=100,
        help="sampler (default: the one of the model's scheduler; with --compat comfyui euler)",
        more_help=f"; one of {', '.join(SAMPLERS)}", group=_DENOISING, metavar="NAME", record="always",
        sweep="names of samplers", on_sheet=True,
    )  # fmt: skip
    refiner_sampler: str | None = setting(
        None, node="sampler_name", record_none=True, longest=100, help="sampler of the refiner (default: the base's)",
        group=_DENOISING, metavar="NAME", record="always", stage="refiner", follows="sampler",
        sweep="names of samplers", on_sheet=True,
        resolved=lambda resolved: resolved.refiner_sampler if resolved.uses_refiner else None,
    )  # fmt: skip
    cache: int = setting(
        1, help="run the whole UNet in every Nth step, and between them its outermost level (1: in every step)",
        unit="steps", low=1, group=_DENOISING, metavar="N", workflow="beside", sweep="whole numbers", on_sheet=True,
    )  # fmt: skip
    refiner_cache: int | None = setting(
        None, help="the same for the refiner (default: the base's)", unit="steps", low=1, group=_DENOISING,
        metavar="N", stage="refiner", follows="cache", workflow="beside", sweep="whole numbers", on_sheet=True,
    )  # fmt: skip
    schedule: str = setting(
        "", node="scheduler", longest=100,
        help="leading, trailing or linspace, with +karras, +exponential, +beta or +lu (default: the model's own)",
        more_help=f"; with --compat comfyui normal (default), {_OTHER_SCHEDULES}", group=_DENOISING,
        metavar="SPACING[+TRANSFORM]", record="always",
    )  # fmt: skip
    width: int | None = setting(
        None, node="the width", low=1, model_range=True, help="width (default: the model's)", unit="pixels",
        group=_PICTURE, metavar="W", record="always", resolved=lambda resolved: resolved.width,
    )  # fmt: skip
    height: int | None = setting(
        None, node="the height", low=1, model_range=True, help="height (default: the model's)", unit="pixels",
        group=_PICTURE, metavar="H", record="always", resolved=lambda resolved: resolved.height,
    )  # fmt: skip
    aesthetic_score: float = setting(
        6.0, node="ascore", record_none=True, help="aesthetic score, an input of the refiner (6.0)", group=_DENOISING,
        metavar="A", stage="score", record="always", sweep="numbers", on_sheet=True,
        resolved=_side(0, "aesthetic_score"),
    )  # fmt: skip
    negative_aesthetic_score: float = setting(
        2.5, node="ascore", record_none=True, help="aesthetic score of the negative side (2.5)", group=_DENOISING,
        metavar="A", stage="score", unstated=True, record="always", resolved=_side(1, "negative_aesthetic_score"),
    )  # fmt: skip
    tile: bool = setting(
        False, help="encode and decode in tiles: less memory for large pictures", group=_ENGINES, const=True,
        record="always", workflow="beside",
    )  # fmt: skip
    vae: str = setting(
        "full", help="full, or tiny: decode with the bundle's tiny decoder, nearly the same picture in a fraction of"
        " the time", group=_ENGINES, choices=("full", "tiny"), sweep="full and tiny", on_sheet=True,
    )  # fmt: skip
    image: "InputPicture | NDArray[np.uint8] | NDArray[np.float32] | None" = setting(
        None, help="change this picture (PNG, JPEG, WebP, GIF, BMP), or latents that --save-latents kept",
        group=_START, metavar="FILE", exclusive="start", is_file=True, record="own",
    )  # fmt: skip
    """Pixels uint8 (height, width, 3), or latents float32 as `Run.final` has them."""
    refine: bool = setting(
        False, help="change this picture with the refiner alone", group=_START, metavar="FILE", exclusive="start",
        is_file=True, record="own",
    )  # fmt: skip
    mask: "InputMask | NDArray[np.uint8] | NDArray[np.bool_] | None" = setting(
        None, help="change only what is white in this picture, which has the size of the one to start from",
        group=_START, metavar="FILE", is_file=True, record="own",
    )  # fmt: skip
    """uint8 or bool (height, width)."""
    outpaint: tuple[int, int, int, int] = setting(
        (0, 0, 0, 0), help="add margins to the picture, and change them (and what the mask says)", unit="pixels", low=0,
        high=1 << 14, group=_START, metavar="L,T,R,B", parse=_margins,
    )  # fmt: skip
    mask_blur: int | None = setting(
        None, help="soften the edge along which the original is pasted back (4); with --compat comfyui, paste it",
        unit="pixels", low=0, high=1024, group=_START, metavar="N",
    )  # fmt: skip
    paste: bool | None = setting(
        None, help="do not paste the original back outside the mask", group=_START, option="--no-paste", const=False,
    )  # fmt: skip
    """Whether the original is pasted back outside the mask after decoding; None: unless ComfyUI's way is followed."""
    strength: float | None = setting(
        None, node="denoise", help="how much of the picture is changed, 0 to 1 (0.3; with a mask 0.9999)",
        unit="fraction", low=0, high=1,
        without="low", advice="choose above 0, for hardly a change, to 1, for all of the steps", group=_START,
        metavar="S", sweep="numbers from 0 to 1", record="own", repeats=True,
    )  # fmt: skip
    """The fraction of the steps that change the picture. None is 0.3, with a mask 0.9999 (in ComfyUI's way 1), as in
    diffusers, or 1 beside `base_start_step`. In ComfyUI's way
    it is `denoise`: all steps are taken, on a schedule that begins further down."""
    loras: tuple[LoraUse, ...] = setting(
        (), help="change the base by this LoRA, with a scale on its UNet (1) and on its text encoders (the UNet's)",
        more_help="; may be given several times; none leaves out those of --from", group=_PICTURE, option="--lora",
        metavar="FILE[:SCALE[:TE_SCALE]]", parse=parse_use, several=True, record="own",
    )  # fmt: skip
    refiner_loras: tuple[LoraUse, ...] = setting(
        (), help="change the refiner by this LoRA", group=_PICTURE, option="--refiner-lora",
        metavar="FILE[:SCALE[:TE_SCALE]]", parse=parse_use, several=True, stage="refiner", record="own",
    )  # fmt: skip
    lora_dir: "Path | None" = setting(
        None, help="folder, with its sub-folders, of LoRAs that are named without a path: in --lora, in prompts"
        " (<lora:NAME:SCALE>) and in workflows", group=_PICTURE, metavar="DIR", is_file=True, record="no",
        workflow="replaces",
    )  # fmt: skip
    embedding_dir: "Path | None" = setting(
        None, help="folder, with its sub-folders, of the textual inversion embeddings that prompts name"
        " (embedding:NAME)",
        group=_PICTURE, metavar="DIR", is_file=True, record="no", workflow="beside",
    )  # fmt: skip
    controls: "tuple[ControlUse, ...]" = setting(
        (), help="let a ControlNet of the bundle follow this picture, with a scale (1), from and to a fraction of the"
        " steps (0:1)", more_help="; the bundle's ControlNets take the pictures in order, or by NAME; may be given"
        " several times; none leaves out those of --from", group=_START, option="--control",
        metavar="[NAME=]FILE[:SCALE[:START:END]]", parse=parse_control, several=True, stage="base", record="own",
    )  # fmt: skip
    control_guess: bool = setting(
        False, help="let the ControlNets work without a prompt: on the positive side alone, the finer levels less",
        group=_START, const=True, stage="base",
    )  # fmt: skip
    compat: Literal["diffusers", "comfyui"] = setting(
        "diffusers", help="whose conventions to follow for noise, prompt weights, timesteps and pixels (diffusers)",
        choices=("diffusers", "comfyui"), group=_COMFYUI, workflow="replaces",
    )  # fmt: skip
    original_size: tuple[int, int] | None = setting(
        None, node="the size", help="original size, an input of the model (default: the picture's)", unit="pixels",
        low=0, high=MAX_SIZE, group=_DENOISING, metavar="WxH", parse=parse_size,
    )  # fmt: skip
    crop: tuple[int, int] = setting(
        (0, 0), node="the crop", help="top-left corner of the crop, an input of the model (0,0)", unit="pixels", low=0,
        high=MAX_SIZE, group=_DENOISING, metavar="X,Y", parse=_corner,
    )  # fmt: skip
    target_size: tuple[int, int] | None = setting(
        None, node="the target size", help="target size, an input of the model (default: the picture's)",
        unit="pixels", low=0, high=MAX_SIZE, group=_DENOISING, metavar="WxH", parse=parse_size,
    )  # fmt: skip
    clip_skip: int = setting(
        0, low=-1, model_range=True,
        help="text encoder layers to skip beyond SDXL's one (0); with --compat comfyui, -1 skips none", unit="layers",
        group=_DENOISING, metavar="K", workflow="reads",
    )  # fmt: skip
    base_end_step: int | None = setting(
        None, node="end_at_step", help="the base's end_at_step", unit="steps", low=0, advice="steps count from 0",
        group=_COMFYUI, metavar="K", stage="handoff",
    )  # fmt: skip
    refiner_start_step: int | None = setting(
        None, node="start_at_step", help="the refiner's start_at_step", unit="steps", low=0,
        advice="steps count from 0", group=_COMFYUI, metavar="K", stage="refiner",
    )  # fmt: skip
    refiner_add_noise: bool = setting(
        False, help="the refiner's add_noise: enable", group=_COMFYUI, const=True, stage="refiner",
    )  # fmt: skip
    leftover_noise: bool | None = setting(
        None, help="the base's return_with_leftover_noise: disable", group=_COMFYUI, option="--no-leftover-noise",
        const=False, stage="handoff",
    )  # fmt: skip
    """Whether the base leaves the noise of the sigma it stops at; None: if a refiner continues from there."""
    prediction_type: str = setting(
        "auto", help="what the UNets predict (auto: as the bundle states)", group=_DENOISING,
        choices=("auto", "epsilon", "v_prediction", "sample"), workflow="beside",
    )  # fmt: skip
    count: int | None = setting(
        None, node="batch_size", help="number of pictures, with seeds N, N+1, … (1)", unit="pictures", low=1,
        high=10_000, group=_PICTURE, option="-n", metavar="COUNT", record="own", repeats=True,
    )  # fmt: skip
    latents: "NDArray[np.float32] | None" = setting(
        None, help="initial noise, float32 of unit variance", group=_DENOISING, metavar="FILE.npy", is_file=True,
        record="own", workflow="beside", several_runs=False,
    )  # fmt: skip
    """Shape (count, channels, height/8, width/8)."""

    # What only a workflow states.
    base_start_step: int = setting(
        0, node="start_at_step", unit="steps", low=0, advice="steps count from 0", record="workflow",
    )  # fmt: skip
    base_add_noise: bool = setting(True, record="workflow")
    refiner_end_step: int | None = setting(
        None, node="end_at_step", unit="steps", low=0, advice="steps count from 0", record="workflow", stage="refiner",
    )  # fmt: skip
    refiner_leftover_noise: bool = setting(False, record="workflow", stage="refiner")
    base_sides: "tuple[Side, Side] | None" = setting(None, record="workflow")
    """The base's (positive, negative) conditioning, in place of the prompts above."""
    refiner_sides: "tuple[Side, Side] | None" = setting(None, record="workflow", stage="refiner")
    refiner_seed: int | None = setting(None, option="--seed", low=0, high=MAX_SEED, record="workflow", stage="refiner")
    """The seed of the refiner's own noise; None: the base's noise continues."""
    refiner_strength: float | None = setting(None, record="workflow", stage="refiner")
    """The refiner's `denoise`, on a schedule of its own; None shares the base's schedule."""
    checkpoints: tuple[str, ...] = setting((), record="no")
    """The workflow's names of the models, base first."""
    graph: str = setting("", record="no")
    """The ComfyUI graph that makes the picture, as JSON in API form, if this request comes from one."""

    @property
    def comfyui(self) -> bool:
        """Return whether ComfyUI's conventions are followed."""
        return self.compat == "comfyui"
