"""Draws the same captions with every setting in turns, and counts what the UNets did meanwhile."""

__all__ = ["Drawn", "Watch", "draw_in_turns", "export_bundles"]

import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt

from sdxl_trt.benchmarks.model_card import CardCase
from sdxl_trt.benchmarks.pareto.points import Point
from sdxl_trt.benchmarks.roofline import count_component
from sdxl_trt.engines import Value
from sdxl_trt.engines.backends.ort import OrtEngine
from sdxl_trt.engines.backends.ov import OvEngine
from sdxl_trt.engines.bundle import Bundle, read_bundle
from sdxl_trt.engines.host import ProgressLine
from sdxl_trt.export import Options, export_bundle
from sdxl_trt.mini import bundle_path
from sdxl_trt.mini.score import Score, score_picture
from sdxl_trt.runtime import Pipeline, Request, open_bundle

SIDE = 128
UNETS = ("unet", "shallow_unet")
_ENGINES = (OrtEngine, OvEngine)


@dataclass
class Watch:
    """Seconds and FLOPs in calls of UNets since the last `reset`; the FLOPs are of `floats`' graphs, at SIDE pixels."""

    floats: Bundle
    seconds: float = 0.0
    flops: float = 0.0

    def reset(self) -> None:
        """Begin again at zero."""
        self.seconds = self.flops = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record all calls of engines within the context."""
        with ExitStack() as stack:
            for engine in _ENGINES:
                for name in ("infer", "infer_keeping"):
                    stack.enter_context(mock.patch.object(engine, name, self._recorded(getattr(engine, name))))
            yield

    def _recorded(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(engine: Any, inputs: Mapping[str, Value], *rest: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = call(engine, inputs, *rest, **options)
            if engine.component.kind in UNETS:
                self.seconds += time.perf_counter() - started
                self.flops += _flops(self.floats.root, engine.name, inputs["sample"].shape[0])
            return result

        return recorded


@lru_cache
def _flops(bundle: Path, name: str, rows: int) -> float:
    return float(count_component(read_bundle(bundle), name, rows=rows, height=SIDE, width=SIDE).flops)


@dataclass
class Drawn:
    """What was drawn with a setting: pictures (n, h, w, 3) uint8 and scores, and each turn's figures.

    `unet` and `whole` are seconds a picture by turn, `flops` those of the UNets a picture.
    """

    pixels: list[npt.NDArray[np.uint8]] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    unet: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    flops: float = 0.0

    def first(self, pictures: int, turns: int) -> "Drawn":
        """Return what was drawn in the first turns."""
        return Drawn(self.pixels[:pictures], self.scores[:pictures], self.unet[:turns], self.whole[:turns], self.flops)


def export_bundles(names: Sequence[str], folder: Path) -> dict[str, Path]:
    """Return the embedded pair's bundles by name: its own in fp16, others exported to `folder` if they are new."""
    usual = bundle_path()
    found = {"fp16": usual}
    for name in names:
        if name != "fp16":
            found[name] = folder / name.replace(" ", "-")
            if not found[name].exists():
                shutil.copytree(usual, found[name])
            export_bundle(out=found[name], options=Options(
                precision="int8", vae_precision="int8" if "decoder" in name else "auto"))  # fmt: skip
    return found


def draw_in_turns(
    points: Mapping[str, Point], bundles: Mapping[str, Path], cases: Mapping[str, Sequence[CardCase]], turn: int,
    line: ProgressLine,
) -> dict[str, Drawn]:  # fmt: skip
    """Draw every point's `cases`, `turn` at a time so that the machine's moods meet all of them.

    All have the same first cases. Each turn starts with another point. A warm-up picture is drawn of every point first.
    """
    found: dict[str, Drawn] = defaultdict(Drawn)
    watch, names = Watch(read_bundle(bundles["fp16"])), list(points)
    with ExitStack() as stack:
        pipelines: dict[tuple[str, str], Pipeline] = {}
        for point in points.values():
            place = (point.bundle, point.provider)
            if place not in pipelines:
                opened = open_bundle(bundles[point.bundle], provider=point.provider, residency="resident")
                pipelines[place] = stack.enter_context(opened)
        stack.enter_context(watch.watching())
        for name, point in points.items():
            line.draw("warm-ups", f"warming up {name}")
            _draw(pipelines[point.bundle, point.provider], point, cases[name][:1])
        most = max(map(len, cases.values()))
        for number, start in enumerate(range(0, most, turn)):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                part = cases[name][start : start + turn]
                if not part:
                    continue
                line.draw("captions", name, start, most, unit=" captions")
                point, drawn = points[name], found[name]
                watch.reset()
                started = time.perf_counter()
                pixels = _draw(pipelines[point.bundle, point.provider], point, part)
                drawn.whole.append((time.perf_counter() - started) / len(part))
                drawn.unet.append(watch.seconds / len(part))
                drawn.flops = watch.flops / len(part)
                drawn.pixels += pixels
                drawn.scores += [score_picture(one, case.caption) for one, case in zip(pixels, part, strict=True)]
    return {name: found[name] for name in names}


def _draw(pipeline: Pipeline, point: Point, cases: Sequence[CardCase]) -> list[npt.NDArray[np.uint8]]:
    pictures: list[npt.NDArray[np.uint8]] = []
    for case in cases:
        request = Request(case.caption, seed=case.seed, **point.request)
        pictures += [np.asarray(picture.image) for picture in pipeline.generate(request)]
    return pictures
