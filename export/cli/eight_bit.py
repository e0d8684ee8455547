"""The options of export-engines for 8-bit engines: how ranges are measured, and what stays in floating point."""

__all__ = ["add_eight_bit_options", "calibration_options"]

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.host import option_type, read_capped

if TYPE_CHECKING:
    from sdxl_trt.export.components import CalibrationOptions

_MOST_BYTES = 1 << 20
_RANGES = ".npz"


def add_eight_bit_options(group: Any) -> None:
    """Add the options to an argument group."""
    group.add_argument("--calibration", type=Path, metavar="PROMPTS|FILE.npz", help="measure the ranges of activations"
                       " while the model draws these prompts, one per line (default: shipped prompts), or take those"
                       " that --save-calibration wrote")  # fmt: skip
    group.add_argument("--calibration-size", type=option_type(_size), metavar="PIXELS", help="side of the pictures"
                       " (default: the model's own, at most 512)")  # fmt: skip
    group.add_argument("--calibration-steps", type=option_type(_steps), metavar="BASE:REFINER",
                       help="steps of both (default 24:6; with SDXL's size 4:2, and two prompts)")  # fmt: skip
    group.add_argument("--save-calibration", type=Path, metavar="FILE.npz", help="write the measured ranges")
    group.add_argument("--exclude-layers", action="append", default=[], metavar="PATTERN", help="leave modules in"
                       " floating point, for example 'up_blocks.2.*'; may be repeated")  # fmt: skip
    group.add_argument("--min-psnr", type=float, metavar="DB", help="leave as many layers in floating point as it takes"
                       " for a step to come this close to the float graph")  # fmt: skip
    group.add_argument("--quantize-report", type=Path, metavar="FILE.json", help="write each layer's own error")


def calibration_options(arguments: argparse.Namespace) -> "CalibrationOptions | None":
    """Return what the options say, or None if none is given. Raises UsageError and SourceError."""
    given = (arguments.calibration, arguments.calibration_size, arguments.calibration_steps, arguments.save_calibration,
             arguments.min_psnr, arguments.quantize_report)  # fmt: skip
    if all(each is None for each in given) and not arguments.exclude_layers:
        return None
    from sdxl_trt.export.components import CalibrationOptions  # noqa: PLC0415 - torch: --help must not wait for it

    path: Path | None = arguments.calibration
    ranges = path if path is not None and path.suffix == _RANGES else None
    return CalibrationOptions(
        prompts=None if path is None or ranges is not None else _read_prompts(path),
        file=ranges,
        size=arguments.calibration_size,
        steps=arguments.calibration_steps,
        exclude=tuple(arguments.exclude_layers),
        min_psnr=arguments.min_psnr,
        report=arguments.quantize_report,
        save=arguments.save_calibration,
    )


def _read_prompts(path: Path) -> tuple[str, ...]:
    """Return the lines of a file that are not empty."""
    try:
        lines = read_capped(path, _MOST_BYTES, "--calibration").decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as exc:
        raise UsageError(f"--calibration {path}: is not UTF-8 text ({exc.reason}); write one prompt per line, or give"
                         f" a file of ranges, whose name ends with {_RANGES}") from exc  # fmt: skip
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise UsageError(f"--calibration {path}: has no prompt; write one prompt per line")
    return prompts


def _size(text: str) -> int:
    if not text.isdecimal():
        raise UsageError(f"{text}: expected a number of pixels, for example 512")
    return int(text)


def _steps(text: str) -> tuple[int, int]:
    base, _, refiner = text.partition(":")
    if not base.isdecimal() or not refiner.isdecimal():
        raise UsageError(f"{text}: expected the steps of the base and of the refiner, for example 24:6")
    return int(base), int(refiner)
