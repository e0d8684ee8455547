"""The embedded pair with a step cache and without: `python -m sdxl_trt.benchmarks.model_card.caching`.

All variants draw the same captions from the same noise, in turns. Pictures are compared with those of the same schedule
without a cache, and with the pair's usual 30 steps of euler. Time is the process time of the UNets' steps, one thread.
"""

__all__ = ["main", "one_thread"]

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from sdxl_trt.benchmarks.model_card.cases import CardCase, evaluation_cases
from sdxl_trt.benchmarks.model_card.effects import Pixels, paired_effect, psnr, quality, share_right
from sdxl_trt.engines import Engine
from sdxl_trt.mini.score import Score, score_picture
from sdxl_trt.runtime import Pipeline, Request, open_bundle
from sdxl_trt.runtime.diffusion import CachePolicy, StepCache

USUAL = Request(steps=30, handoff=0.8, sampler="euler")
SCHEDULES: Mapping[str, Request] = {
    "euler, 30 steps": USUAL,
    "euler, 20 steps": replace(USUAL, steps=20),
    "dpmpp_2m karras, 20 steps": replace(USUAL, steps=20, sampler="dpmpp_2m", schedule="leading+karras"),
}
Coordinate = Callable[[float], float]
WAYS: Mapping[str, tuple[Callable[[Coordinate], Coordinate], float | None]] = {
    "": (lambda _: float, None),
    "along sigma": (lambda _: float, 1.0),
    "along sigma, half of the way": (lambda _: float, 0.5),
    "along the square root of sigma": (lambda _: math.sqrt, 1.0),
    "along log sigma": (lambda _: math.log, 1.0),
    "along the timestep": (lambda timestep: timestep, 1.0),
    "reused": (lambda _: float, 0.0),
}
"""How features are extrapolated: the coordinate, made of a schedule's timestep of a sigma, and the reach.

The first is what the runtime does with the sampler.
"""


@dataclass(frozen=True)
class Variant:
    """What is drawn: a schedule, the interval of its cache, and how features are extrapolated."""

    schedule: str
    every: int
    way: str = ""

    def __str__(self) -> str:
        what = "no cache" if self.every == 1 else f"cache {self.every}"
        return f"{self.schedule}, {what}" + (f", {self.way}" if self.way else "")


@dataclass
class Drawn:
    """The pictures of a variant, their scores, the seconds of their steps, and how many steps of each were full."""

    pixels: list[Pixels] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    full_steps: int = 0

    def draw(self, pipeline: Pipeline, variant: Variant, case: CardCase) -> None:
        """Draw and score a case."""
        request = replace(_request(variant.schedule), prompt=case.caption, seed=case.seed, cache=variant.every)
        way, reach = WAYS[variant.way]
        schedule = pipeline.resolve(request).schedule
        along = way(lambda sigma: float(schedule.timestep(sigma)))
        seconds, begun = 0.0, time.process_time()

        def cache(full: Engine, shallow: Engine, policy: CachePolicy) -> StepCache:
            return StepCache(full, shallow, policy if reach is None else replace(policy, reach=reach), along)

        with mock.patch("sdxl_trt.runtime.pipeline.denoising.StepCache", cache):
            for step in pipeline.steps(request):
                seconds += (time.process_time() - begun) * (step.stage in ("base", "refiner"))
                begun = time.process_time()
                if step.picture is not None:
                    self.pixels.append(np.asarray(step.picture.image))
        assert pipeline.run is not None  # noqa: S101 - it has run
        self.full_steps = sum(pipeline.run.full_steps.values())
        self.seconds.append(seconds)
        self.scores.append(score_picture(self.pixels[-1], case.caption))


def compare(found: Drawn, same: Drawn, usual: Drawn) -> dict[str, Any]:
    """Return the figures of a variant beside the `same` schedule without a cache, and beside the `usual` one."""
    distances = [psnr(one, other) for one, other in zip(found.pixels, same.pixels, strict=True)]
    to_usual = [psnr(one, other) for one, other in zip(found.pixels, usual.pixels, strict=True)]
    return {
        "full_steps": found.full_steps,
        "share": float(np.median(np.array(found.seconds) / np.array(usual.seconds))),
        **share_right(found.scores),
        **quality(found.scores),
        "sharper": paired_effect(usual.scores, found.scores, "sharpness"),
        "psnr_same": float(np.median(distances)),
        "psnr_same_worst": float(np.min(distances)),
        "psnr_usual": float(np.median(to_usual)),
    }


def markdown(result: Mapping[str, Any]) -> str:
    """Return the figures as a Markdown table."""
    lines = [
        f"{result['count']} captions, handoff 0.8; times and sharpness beside 30 full steps of euler. PSNR in dB:",
        "median / worst to the same schedule without a cache, median to 30 full steps of euler.",
        "",
        "| drawn with | full steps | UNet time | right % | sharpness, difference (95 %) | PSNR to no cache | to 30 |",
        "|---|---:|---:|---:|---|---:|---:|",
    ]
    for name, row in result["variants"].items():
        sharper = row["sharper"]
        same = "–" if row["psnr_same"] > 98 else f"{row['psnr_same']:.1f} / {row['psnr_same_worst']:.1f}"
        other = "–" if row["psnr_usual"] > 98 else f"{row['psnr_usual']:.1f}"
        lines.append(f"| {name} | {row['full_steps']} | {row['share']:.2f} | {row['right']:.0f} |"
                     f" {sharper['mean']:+.4f} ({sharper['low']:+.4f} to {sharper['high']:+.4f}) | {same} | {other} |"
                     )  # fmt: skip
    return "\n".join(lines)


def variants(schedules: Sequence[str], every: Sequence[int], ways: Sequence[str]) -> list[Variant]:
    """Return what is drawn: each schedule without a cache, and with each interval in each way; first the usual one."""
    drawn = [Variant("euler, 30 steps", 1)]
    for name in schedules:
        drawn += [Variant(name, 1), *(Variant(name, each, way) for each in every for way in ways)]
    return [*dict.fromkeys(drawn)]


def _request(schedule: str) -> Request:
    """Return the request of a schedule: one of the table, or 20 steps of a sampler of this name."""
    return SCHEDULES.get(schedule) or replace(USUAL, steps=20, sampler=schedule)


def main(arguments: list[str] | None = None) -> None:
    """Draw all variants of every caption in turns, print the table and write the figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m sdxl_trt.benchmarks.model_card.caching", description=__doc__)
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--every", type=int, action="append", help="an interval; may be repeated (default: 2 and 3)")
    parser.add_argument("--sampler", action="append", help="20 steps of this sampler, in place of the usual three"
                        " schedules; may be repeated")  # fmt: skip
    parser.add_argument("--ways", action="store_true", help="compare ways to extrapolate")
    parser.add_argument("--output", type=Path, help="JSON file that receives the figures")
    options = parser.parse_args(arguments)
    ways = [*WAYS][1:] if options.ways else [""]
    chosen = variants(options.sampler or [*SCHEDULES], options.every or (2, 3), ways)
    drawn = {variant: Drawn() for variant in chosen}
    with (
        mock.patch("onnxruntime.SessionOptions", one_thread()),
        open_bundle(residency="resident", provider="ort-cpu") as pipeline,
    ):
        for case in evaluation_cases(options.count):
            for variant in chosen:
                drawn[variant].draw(pipeline, variant, case)
    usual = drawn[Variant("euler, 30 steps", 1)]
    figures = {str(each): compare(found, drawn[Variant(each.schedule, 1)], usual)
               for each, found in drawn.items()}  # fmt: skip
    result = {"count": options.count, "variants": figures}
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8", newline="\n")
    print(markdown(result))


def one_thread() -> Any:
    """Return ONNX Runtime's options for a session of one thread: others spin while they wait, and count as work."""
    import onnxruntime  # noqa: PLC0415 - the plain one, which is replaced

    class OneThread(onnxruntime.SessionOptions):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.intra_op_num_threads = 1

    return OneThread


if __name__ == "__main__":
    main()
