"""The plan options of export-engines: which plans to build, for which sizes, and how."""

__all__ = ["Engine", "PlanOptions", "add_plan_options", "plan_options"]

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sdxl_trt.engines import UsageError
from sdxl_trt.engines.host import option_type, parse_bytes

if TYPE_CHECKING:
    from sdxl_trt.engines.bundle import BuildFlags, Flavour, Manifest, Range
    from sdxl_trt.engines.plans import Sizes

Engine = Literal["none", "tensorrt", "tensorrt-rtx"]
_MEANINGS = {
    "height": "picture height in pixels (default: from 0.5 to 1.25 times the model's own)",
    "width": "picture width, likewise",
    "batch": "pictures per batch (default 1)",
    "tokens": "prompt tokens (default 77:77:231; with Long-CLIP encoders 248:248:744)",
}


@dataclass(frozen=True)
class PlanOptions:
    """Which plans to build after the graphs; an axis without a range gets the model's default."""

    flavour: "Flavour"
    ranges: "dict[str, Range]"
    static: bool
    flags: "BuildFlags"
    timing_cache: Path | bool
    plans_only: bool
    lora_rank: int = 0

    @property
    def told(self) -> str:
        """The plans in words."""
        second = f", and another for LoRAs of UNets and text encoders, rank {self.lora_rank}" if self.lora_rank else ""
        return f"a {self.flavour} plan of every component{second}"

    def sizes(self, manifest: "Manifest") -> "Sizes":
        """Return the sizes for the models of `manifest`."""
        from sdxl_trt.engines.plans import Sizes, stage_sizes  # noqa: PLC0415 - numpy: --help must not wait

        usual = stage_sizes(manifest)
        chosen = {name: self.ranges.get(name, getattr(usual, name)) for name in _MEANINGS}
        return Sizes(**chosen, static=self.static)


def add_plan_options(group: Any) -> None:
    """Add the options to an argument group."""
    group.add_argument("--engine", choices=("none", "tensorrt", "tensorrt-rtx"), help="plans to build after the graphs"
                       " (default: tensorrt if it can run here, else none)")  # fmt: skip
    for side, meaning in _MEANINGS.items():
        group.add_argument(f"--{side}", type=option_type(_range), metavar="MIN:OPT:MAX", help=meaning)
    group.add_argument("--static", action="store_true", help="only a single size, the OPT of each range")
    group.add_argument(
        "--lora-rank",
        type=option_type(_rank),
        default=0,
        metavar="N",
        help="also plans for requests with LoRAs, whose ranks sum up to N at most (default: none)",
    )
    group.add_argument("--opt-level", type=int, choices=range(6), default=3, metavar="N",
                       help="how long TensorRT searches, 0 to 5 (default 3)")  # fmt: skip
    caches = group.add_mutually_exclusive_group()
    caches.add_argument("--timing-cache", type=Path, default=True, metavar="FILE", help="read and updated: makes later"
                        " builds faster (default: one per GPU and TensorRT version in the cache folder)")  # fmt: skip
    caches.add_argument("--no-timing-cache", dest="timing_cache", action="store_false", default=True,
                        help="time every kernel anew")  # fmt: skip
    group.add_argument("--workspace", type=option_type(parse_bytes), default=0, metavar="SIZE",
                       help="limit for scratch memory, e.g. 8GiB")  # fmt: skip
    group.add_argument("--weight-streaming", action="store_true", help="let weights stay in host memory at run time")
    group.add_argument("--version-compatible", action="store_true", help="plans that run on later minor versions too")
    group.add_argument("--hardware-compatible", nargs="?", choices=("same", "ampere"), const="ampere",
                       help="slower plans that run on several GPUs: same, for one compute capability; ampere (also"
                       " without a value), for all since Ampere")  # fmt: skip
    group.add_argument("--plans-only", action="store_true", help="leave the graphs and weights out of the bundle")


def plan_options(arguments: argparse.Namespace, can_build: Callable[[], bool]) -> PlanOptions | None:
    """Return which plans to build, or None for none; `can_build` decides if no engine is named.

    Raises UsageError if plan options are given but no plan would be built.
    """
    ranges = {side: getattr(arguments, side) for side in _MEANINGS if getattr(arguments, side) is not None}
    wanted = ranges or arguments.plans_only or arguments.static or arguments.weight_streaming or arguments.lora_rank
    engine: Engine = arguments.engine or ("tensorrt" if can_build() else "none")
    if engine == "none":
        if wanted:
            raise UsageError("sizes, --static, --lora-rank, --weight-streaming and --plans-only apply to plans, but"
                             " none would be built here; add --engine tensorrt-rtx or --engine tensorrt")  # fmt: skip
        return None
    if arguments.layout == "optimum":
        raise UsageError(f"--engine {engine}: plans belong to a bundle; remove --layout optimum")
    from sdxl_trt.engines.bundle import BuildFlags  # noqa: PLC0415 - --help must not wait for it

    flags = BuildFlags(
        opt_level=arguments.opt_level,
        workspace=arguments.workspace,
        weight_streaming=arguments.weight_streaming,
        version_compatible=arguments.version_compatible,
        hardware_compatible=arguments.hardware_compatible == "ampere",
        same_compute_capability=arguments.hardware_compatible == "same",
    )
    return PlanOptions(engine, ranges, arguments.static, flags, arguments.timing_cache, arguments.plans_only,
                       arguments.lora_rank)  # fmt: skip


def _rank(text: str) -> int:
    from sdxl_trt.engines.plans import MOST_RANK  # noqa: PLC0415 - --help must not wait for it

    if not text.isdecimal() or int(text) > MOST_RANK:
        raise UsageError(f"{text}: expected the largest rank of a request's LoRAs, 1 to {MOST_RANK}, or 0 for no plans"
                         " for LoRAs; most LoRAs have 8 to 128")  # fmt: skip
    return int(text)


def _range(text: str) -> "Range":
    from sdxl_trt.engines.plans import parse_range  # noqa: PLC0415 - --help must not wait for it

    return parse_range(text)
