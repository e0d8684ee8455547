"""The options of trt-generate: those of the request's settings, and the command's own."""

__all__ = ["PROVIDERS", "check_alone_with_workflow", "expand_preset", "make_parser", "stated_settings"]

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.host import Parser, option_type, parse_bytes
from sdxl_trt.runtime.presets import PRESETS, preset_options
from sdxl_trt.runtime.request import GROUPS, Request, Setting, settings_of

PROVIDERS = ("auto", "ort-cpu", "ort-cuda", "ort-tensorrt", "tensorrt", "tensorrt-rtx", "openvino")
FORMATS = ("png", "jpeg", "webp")
_SETTINGS = settings_of(Request)
EPILOG = """examples:
  trt-generate "a large red star on a blue background" -o star.png
  trt-generate "a red fox" --engines my-bundle --steps 30 --handoff 0.8 --seed 7
  trt-generate "a red fox" --engines my-bundle --no-refiner -n 4 --json
  trt-generate "a red fox" --engines my-bundle --sweep handoff=0.25,0.5,0.6,0.7,0.8,none -o sheet.png
  trt-generate --from fox.png --steps 50
  trt-generate "a (red:1.2) fox" --engines my-bundle --compat comfyui --schedule karras --sampler dpmpp_2m
  trt-generate "a red fox" --engines my-bundle --image cat.png --strength 0.6
  trt-generate "a red fox" --engines my-bundle --image cat.png --mask cat-mask.png
  trt-generate --workflow sdxl.json --engines my-bundle
  trt-generate --plan --vram 12GB --engines my-bundle
"""


def make_parser() -> Parser:
    """Return the parser; importing it loads no numpy."""
    parser = Parser(
        prog="trt-generate",
        description="Generate pictures from an exported SDXL bundle: base, handoff, refiner; no torch.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help=_SETTINGS["prompt"].help)
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    exclusive: dict[str, Any] = {}
    for each in _SETTINGS.values():
        group = groups.get(each.group)
        if group is not None and each.exclusive and each.exclusive not in exclusive:
            exclusive[each.exclusive] = group.add_mutually_exclusive_group()
            if each.name == "handoff":
                exclusive[each.exclusive].add_argument("--no-refiner", action="store_true", help="the base alone")
        if group is not None:
            _add_setting(exclusive.get(each.exclusive, group), each)
    _add_output_options(groups["prompt and picture"])
    _add_series_options(groups["series and repeats"])
    groups["as in ComfyUI"].add_argument(
        "--workflow", type=Path, metavar="FILE", help="run a workflow: API JSON, or a picture that contains one; -"
        " reads standard input")  # fmt: skip
    _add_engine_options(groups["engines"])
    return parser


def _add_setting(group: Any, declared: Setting) -> None:
    unstated = declared.unstated or declared.is_file or declared.several
    shared = {"dest": declared.name, "default": None if unstated else declared.default,
              "help": declared.help + declared.more_help}  # fmt: skip
    if declared.const is not ...:
        group.add_argument(declared.word, action="store_const", const=declared.const, **shared)
    elif declared.choices:
        group.add_argument(declared.word, choices=declared.choices, **shared)
    elif declared.several:
        group.add_argument(declared.word, type=_reader(declared), metavar=declared.metavar, action="append", **shared)
    else:
        group.add_argument(declared.word, type=_reader(declared), metavar=declared.metavar, **shared)


def _reader(declared: Setting) -> Callable[[str], Any]:
    """Return the function that reads an option's text."""
    if declared.parse is not None:
        parse = option_type(declared.parse)
        # None stands for none of them, which --from tells from an option that is left out.
        return (lambda text: None if text == "none" else parse(text)) if declared.several else parse
    kinds = (declared.type, *get_args(declared.type))
    return Path if declared.is_file else next(kind for kind in (int, float, str) if kind in kinds)


def expand_preset(name: str, argv: Sequence[str] | None) -> list[str]:
    """Return `argv` (None: the process's) behind the options that preset `name` stands for, and say so on stderr.

    The last of an option given twice counts, so those in `argv` win.
    """
    options = preset_options(name)
    sys.stderr.write(f"--{name} stands for {' '.join(options)}\n")
    return [*options, *(sys.argv[1:] if argv is None else argv)]


def stated_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the request's settings in `arguments` by name, without those that a file holds."""
    found: dict[str, Any] = {}
    for name, each in _SETTINGS.items():
        if (each.group or name == "prompt") and not each.is_file:
            value = getattr(arguments, name)
            value = tuple(one for one in value or () if one is not None) if each.several else value
            found |= {} if each.unstated and value is None else {name: value}
    return found | ({"handoff": None} if arguments.no_refiner else {})


def check_alone_with_workflow(arguments: argparse.Namespace) -> None:
    """Raise UsageError for an option beside --workflow that the workflow states itself."""
    usual = vars(make_parser().parse_args([]))
    stated = {name: each.word for name, each in _SETTINGS.items() if each.workflow in ("states", "reads")}
    for name, option in (stated | {"prompt": "PROMPT", "no_refiner": "--no-refiner"}).items():
        if name in usual and getattr(arguments, name) != usual[name]:
            raise UsageError(f"--workflow states {option} itself; leave it out, or change the workflow")


def _add_output_options(group: Any) -> None:
    group.add_argument("-o", dest="out", type=Path, metavar="FILE", help="file to write or replace (default:"
                       " sdxl-<seed>.png, or the next free name)")  # fmt: skip
    group.add_argument("--format", choices=FORMATS, help="png, or by the ending of -o; webp is lossless")
    group.add_argument("--no-metadata", action="store_true", help="write pictures without their settings")
    group.add_argument("--save-latents", type=Path, metavar="FILE.npz", help="write initial, handoff and final latents")


def _add_series_options(group: Any) -> None:
    keys = ", ".join(each.key for each in _SETTINGS.values() if each.sweep)
    group.add_argument("--sweep", action="append", default=[], metavar="KEY=V1,V2,…",
                       help=f"a contact sheet of variants, twice for a grid: {keys}")  # fmt: skip
    group.add_argument("--prompts", type=Path, metavar="FILE",
                       help="one prompt per line, in one run; # starts a comment; - reads standard input")  # fmt: skip
    group.add_argument("--from", dest="source", type=Path, metavar="IMAGE",
                       help="make a picture again, with the other options given here changed")  # fmt: skip
    group.add_argument("--preview", action="store_true", help="show a rough picture of the running step in a file"
                       " beside -o")  # fmt: skip
    group.add_argument("--preview-method", choices=("linear", "tiny"), help="--preview by a linear approximation"
                       " (default), or by the bundle's tiny decoder on the CPU: sharper, and slower")  # fmt: skip
    fast = group.add_mutually_exclusive_group()
    for name in PRESETS:
        said = f"stands for {' '.join(preset_options(name))}; options given beside it win"
        fast.add_argument(f"--{name}", dest="preset", action="store_const", const=name, help=said)
    group.add_argument("--schema", action="store_true", help="print the JSON schema of a request and exit")


def _add_engine_options(group: Any) -> None:
    group.add_argument("--engines", type=Path, metavar="BUNDLE", help="exported folder (default: the embedded pair)")
    group.add_argument("--provider", choices=PROVIDERS, default="auto", help="what runs the graphs (auto:"
                       " the fastest of TensorRT and ONNX Runtime)")  # fmt: skip
    group.add_argument("--compute-precision", choices=("auto", "fp32", "bf16"), default="auto",
                       help="what openvino computes in (auto: bf16 where the CPU has it, else fp32)")  # fmt: skip
    group.add_argument("--residency", choices=("auto", "resident", "swap", "stream"), default="auto",
                       help="resident: both experts in memory; swap: one at a time; stream: part of one; auto: the"
                       " first that fits, swap on a CPU")  # fmt: skip
    group.add_argument("--plan", action="store_true", help="print what would be loaded when, and generate nothing")
    group.add_argument(
        "--vram", type=option_type(parse_bytes), metavar="SIZE", help="limit memory to, or --plan for, 12GB, 16GiB, …"
    )
    group.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    group.add_argument("--debug", action="store_true", help="add the traceback to an error")
