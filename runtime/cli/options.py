"""The options of trt-generate: what they are called, what they take, what --help says of them."""

__all__ = ["COMFYUI_SCHEDULES", "NEGATIVE_SCORE", "PROVIDERS", "SAMPLERS", "check_alone_with_workflow", "make_parser"]

import argparse
from pathlib import Path

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.host import Parser

PROVIDERS = ("auto", "ort-cpu", "ort-cuda", "ort-tensorrt", "tensorrt", "tensorrt-rtx")
# Told again here, since --help must not wait for numpy; a test holds the two together.
SAMPLERS = (
    "euler", "heun", "dpm_2", "lms", "dpmpp_2m", "ddim", "uni_pc", "deis", "res_multistep", "euler_ancestral",
    "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "lcm",
)  # fmt: skip
FORMATS = ("png", "jpeg", "webp")
NEGATIVE_SCORE = 2.5
"""The negative aesthetic score where none is given."""
COMFYUI_SCHEDULES = (
    "simple", "sgm_uniform", "karras", "exponential", "ddim_uniform", "beta", "normal", "linear_quadratic",
    "kl_optimal",
)  # fmt: skip
OTHERS = tuple(name for name in COMFYUI_SCHEDULES if name != "normal")
_IN_WORKFLOW = (
    "prompt", "prompt_2", "negative", "negative_2", "width", "height", "count", "steps", "handoff", "handoff_step",
    "handoff_sigma", "no_refiner", "guidance", "refiner_guidance", "sampler", "refiner_sampler", "schedule",
    "aesthetic_score", "negative_aesthetic_score", "original_size", "crop", "target_size", "clip_skip", "base_end_step",
    "refiner_start_step", "refiner_add_noise", "leftover_noise", "image", "refine", "strength",
)  # fmt: skip
EPILOG = """examples:
  trt-generate "a large red star on a blue background" -o star.png
  trt-generate "a red fox" --engines my-bundle --steps 30 --handoff 0.8 --seed 7
  trt-generate "a red fox" --engines my-bundle --no-refiner -n 4 --json
  trt-generate "a red fox" --engines my-bundle --sweep handoff=0.25,0.5,0.6,0.7,0.8,none -o sheet.png
  trt-generate --from fox.png --steps 50
  trt-generate "a (red:1.2) fox" --engines my-bundle --compat comfyui --schedule karras --sampler dpmpp_2m
  trt-generate "a red fox" --engines my-bundle --image cat.png --strength 0.6
  trt-generate --workflow sdxl.json --engines my-bundle
  trt-generate --plan --vram 12GB --engines my-bundle
"""


def make_parser() -> Parser:
    """Return the parser; importing it costs no numpy."""
    parser = Parser(
        prog="trt-generate",
        description="Generate pictures from an exported SDXL bundle: base, handoff, refiner; no torch.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="what the picture shows")
    _add_prompt_options(parser)
    _add_run_options(parser)
    _add_image_options(parser)
    _add_series_options(parser)
    _add_comfyui_options(parser)
    _add_engine_options(parser)
    return parser


def check_alone_with_workflow(arguments: argparse.Namespace) -> None:
    """Raise UsageError for an option beside --workflow that the workflow states itself."""
    usual = vars(make_parser().parse_args([]))
    for name in _IN_WORKFLOW:
        if getattr(arguments, name) != usual[name]:
            option = {"prompt": "PROMPT", "count": "-n"}.get(name, f"--{name.replace('_', '-')}")
            raise UsageError(f"--workflow states {option} itself; leave it out, or change the workflow")


def _add_prompt_options(parser: Parser) -> None:
    group = parser.add_argument_group("prompt and picture")
    group.add_argument("--prompt-2", metavar="TEXT", help="what the base's second encoder reads instead")
    group.add_argument("--negative", metavar="TEXT", help='what to stay away from; none is not the same as ""')
    group.add_argument("--negative-2", metavar="TEXT", help="the same for the second encoder")
    group.add_argument("--width", type=int, metavar="W", help="pixels (default: the model's)")
    group.add_argument("--height", type=int, metavar="H", help="pixels (default: the model's)")
    group.add_argument("-n", dest="count", type=int, metavar="COUNT", help="pictures, with seeds N, N+1, … (default 1)")
    group.add_argument("--seed", type=int, metavar="N", help="0 to 2^64-1 (default: drawn and printed)")
    group.add_argument("-o", dest="out", type=Path, metavar="FILE", help="file to write or replace (default:"
                       " sdxl-<seed>.png, or the next name that is free)")  # fmt: skip
    group.add_argument("--format", choices=FORMATS, help="png, or by the ending of -o; webp is without loss")
    group.add_argument("--no-metadata", action="store_true", help="write pictures without their settings")


def _add_run_options(parser: Parser) -> None:
    group = parser.add_argument_group("denoising")
    group.add_argument("--steps", type=int, default=30, metavar="N", help="steps of base and refiner together (30)")
    where = group.add_mutually_exclusive_group()
    where.add_argument("--handoff", type=_handoff, default="auto", metavar="F|none",
                       help="share of the noise range that the base denoises (default 0.8)")  # fmt: skip
    where.add_argument("--handoff-step", type=int, metavar="K", help="hand over after K steps")
    where.add_argument("--handoff-sigma", type=float, metavar="S", help="hand over at the first sigma not above S")
    where.add_argument("--no-refiner", action="store_true", help="the base alone, as --handoff none")
    group.add_argument("--guidance", type=float, default=5.0, metavar="G", help="classifier-free guidance (5.0)")
    group.add_argument("--refiner-guidance", type=float, metavar="G", help="the refiner's (default: the base's)")
    group.add_argument(
        "--guidance-rescale", type=float, default=0.0, metavar="R", help="0 to 1: take back contrast (0)"
    )
    group.add_argument("--guidance-interval", type=_interval, default=(0.0, 1.0), metavar="LO:HI",
                       help="guide these steps only, as fractions (0:1); the others cost half")  # fmt: skip
    group.add_argument("--sampler", default="auto", metavar="NAME",
                       help=f"{', '.join(SAMPLERS)} (default: what the model's author chose; with --compat comfyui"
                       " euler)")  # fmt: skip
    group.add_argument("--refiner-sampler", metavar="NAME", help="the refiner's (default: the base's)")
    group.add_argument("--schedule", default="", metavar="SPACING[+TRANSFORM]",
                       help="leading, trailing or linspace, with +karras, +exponential, +beta or +lu (default: the"
                       f" model's own); with --compat comfyui normal (default), {', '.join(OTHERS)}")  # fmt: skip
    group.add_argument("--prediction-type", choices=("auto", "epsilon", "v_prediction", "sample"), default="auto",
                       help="what the UNets predict (auto: what the bundle says)")  # fmt: skip
    group.add_argument("--aesthetic-score", type=float, default=6.0, metavar="A", help="told to the refiner (6.0)")
    group.add_argument("--negative-aesthetic-score", type=float, metavar="A", help="of the negative (2.5)")
    group.add_argument("--original-size", type=_size, metavar="WxH", help="size that the model is told it was cut from")
    group.add_argument("--crop", type=_corner, default=(0, 0), metavar="X,Y", help="where it was cut from that (0,0)")
    group.add_argument("--target-size", type=_size, metavar="WxH", help="size that the model is told it has (its own)")
    group.add_argument("--clip-skip", type=int, default=0, metavar="K",
                       help="text encoder layers to leave out (0); -1, with --compat comfyui, leaves none"
                       " out")  # fmt: skip
    group.add_argument("--latents", type=Path, metavar="FILE.npy", help="initial noise, float32 of unit variance")
    group.add_argument("--save-latents", type=Path, metavar="FILE.npz", help="write initial, handoff and final latents")


def _add_image_options(parser: Parser) -> None:
    group = parser.add_argument_group("starting from a picture")
    which = group.add_mutually_exclusive_group()
    which.add_argument("--image", type=Path, metavar="FILE",
                       help="change this picture (PNG, JPEG, WebP, GIF, BMP), or latents that --save-latents"
                       " kept")  # fmt: skip
    which.add_argument("--refine", type=Path, metavar="FILE", help="the same by the refiner alone")
    group.add_argument("--strength", type=float, metavar="S", help="how much it is changed, 0 to 1 (0.3)")


def _add_series_options(parser: Parser) -> None:
    group = parser.add_argument_group("series and repeats")
    group.add_argument("--sweep", action="append", default=[], metavar="KEY=V1,V2,…",
                       help="a contact sheet of variants, twice for a grid: handoff, handoff-step, aesthetic-score,"
                       " guidance, refiner-guidance, seed, steps, strength, sampler, refiner-sampler")  # fmt: skip
    group.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="a prompt a line, all in one run; # starts a comment; - reads standard input",
    )
    group.add_argument("--from", dest="source", type=Path, metavar="IMAGE",
                       help="make a picture again, with what else is given changed")  # fmt: skip
    group.add_argument("--preview", action="store_true", help="show the running step, roughly, in a file beside -o")


def _add_comfyui_options(parser: Parser) -> None:
    group = parser.add_argument_group("as in ComfyUI")
    group.add_argument("--compat", choices=("diffusers", "comfyui"), default="diffusers",
                       help="whose noise, prompt weights, timesteps and pixels (diffusers)")  # fmt: skip
    group.add_argument("--workflow", type=Path, metavar="FILE", help="run a workflow: API JSON, or a picture that"
                       " has one; - reads standard input")  # fmt: skip
    group.add_argument("--base-end-step", type=int, metavar="K", help="the base's end_at_step")
    group.add_argument("--refiner-start-step", type=int, metavar="K", help="the refiner's start_at_step")
    group.add_argument("--refiner-add-noise", action="store_true", help="the refiner's add_noise: enable")
    group.add_argument("--no-leftover-noise", dest="leftover_noise", action="store_false", default=None,
                       help="the base's return_with_leftover_noise: disable")  # fmt: skip


def _add_engine_options(parser: Parser) -> None:
    group = parser.add_argument_group("engines")
    group.add_argument("--engines", type=Path, metavar="BUNDLE", help="exported folder (default: the embedded pair)")
    group.add_argument("--provider", choices=PROVIDERS, default="auto", help="what runs the graphs")
    group.add_argument("--residency", choices=("auto", "resident", "swap", "stream"), default="auto",
                       help="resident: both experts in memory; swap: one at a time; stream: a part of one; auto: the"
                       " first that fits, on a CPU swap")  # fmt: skip
    group.add_argument("--tile", action="store_true", help="encode and decode in tiles: less memory for large pictures")
    group.add_argument("--plan", action="store_true", help="print what would be loaded when, and generate nothing")
    group.add_argument("--vram", type=_bytes, metavar="SIZE", help="make do with, or --plan for, 12GB, 16GiB, …")
    group.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    group.add_argument("--debug", action="store_true", help="add the traceback to an error")


def _interval(text: str) -> tuple[float, float]:
    first, _, last = text.partition(":")
    try:
        return float(first), float(last)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"{text!r}: give two fractions of the steps, 0.1:0.8 say") from exc


def _size(text: str) -> tuple[int, int]:
    """Return (height, width) of ``WxH``."""
    width, _, height = text.lower().partition("x")
    try:
        return int(height), int(width)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"{text!r}: give width and height in pixels, 1024x768 say") from exc


def _corner(text: str) -> tuple[int, int]:
    """Return (top, left) of ``X,Y``."""
    left, _, top = text.partition(",")
    try:
        return int(top), int(left)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"{text!r}: give the left and the top in pixels, 0,128 say") from exc


def _bytes(text: str) -> int:
    from sdxl_trt.engines.host import parse_bytes  # noqa: PLC0415 - --help must not wait for it

    try:
        return parse_bytes(text)
    except UsageError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc


def _handoff(text: str) -> float | str | None:
    if text in ("auto", "none"):
        return "auto" if text == "auto" else None
    try:
        return float(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a fraction between 0 and 1 nor none") from exc
