"""`--from`: the settings of an earlier picture in the place of the options that the command line leaves out."""

__all__ = ["repeated"]

import argparse
from collections.abc import Sequence
from typing import Any

from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime.metadata import Settings, read_settings
from sdxl_trt.runtime.options import make_parser

ALIKE = (
    "prompt", "negative", "seed", "steps", "guidance", "guidance_rescale", "guidance_interval", "sampler", "schedule",
    "width", "height", "aesthetic_score", "negative_aesthetic_score", "tile",
    "compat", "original_size", "crop", "target_size", "clip_skip", "base_end_step", "refiner_start_step",
    "refiner_add_noise", "leftover_noise", "count",
)  # fmt: skip
"""Settings that have the name of their option."""
FOLLOWING = {
    "prompt_2": "prompt", "negative_2": "negative", "refiner_guidance": "guidance", "refiner_sampler": "sampler",
}  # fmt: skip
"""Settings that are another one where they are not stated."""


def repeated(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options in `argv`, and those of the picture that it names with `--from` for all that it leaves out.

    A handoff keeps its share of the steps where another number of them is asked for. Raises UsageError for a picture
    that cannot be repeated.
    """
    parser = make_parser()
    source = parser.parse_args(argv).source
    settings = read_settings(source)
    if settings.workflow:
        raise UsageError(f"--from {source}: a workflow made it; run that again with --workflow")
    parser.set_defaults(**_defaults(settings))
    arguments = parser.parse_args(argv)
    if settings.injected_latents and arguments.latents is None:
        raise UsageError(f"--from {source}: was made from noise of its own; give that with --latents FILE.npy")
    _take_handoff(arguments, settings)
    return arguments


def _defaults(settings: Settings) -> dict[str, Any]:
    """Return the options that make the picture again, without the handoff; what is None is left to the defaults."""
    found = {name: getattr(settings, name) for name in ALIKE}
    # What only repeats another setting follows that when it is replaced.
    for name, other in FOLLOWING.items():
        value = getattr(settings, name)
        found[name] = value if value != getattr(settings, other) else None
    return {name: value for name, value in found.items() if value is not None}


def _take_handoff(arguments: argparse.Namespace, settings: Settings) -> None:
    stated = arguments.handoff != "auto" or arguments.no_refiner
    ends = (arguments.handoff_step, arguments.handoff_sigma, arguments.base_end_step, arguments.refiner_start_step)
    if stated or any(end is not None for end in ends):
        return
    if settings.handoff_step is None:
        arguments.no_refiner = True
    elif arguments.steps == settings.steps:
        arguments.handoff_step = settings.handoff_step
    else:
        share = round(settings.handoff_step * arguments.steps / settings.steps)
        arguments.handoff_step = min(max(share, 1), max(arguments.steps - 1, 1))
