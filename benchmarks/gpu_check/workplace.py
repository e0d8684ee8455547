"""The shared state of ``make gpu-check``: a bundle, and runs that are made once for all checks that need them."""

__all__ = ["PICTURES", "Measured", "Skipped", "Workplace", "counted"]

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from sdxl_trt.engines import IncompatibleError
from sdxl_trt.engines.backends.cuda import Cuda
from sdxl_trt.engines.backends.trt import current_environment, tensorrt_module
from sdxl_trt.engines.bundle import BuildFlags, Bundle, Flavour, PlanRecord, read_bundle
from sdxl_trt.engines.host import cache_folder
from sdxl_trt.engines.plans import find_plan, planned_components
from sdxl_trt.engines.residency import open_pool
from sdxl_trt.mini import bundle_path
from sdxl_trt.runtime import Request
from sdxl_trt.runtime.pipeline import Pipeline

PROMPT, SEED, STEPS = "a large red star on a blue background", 7, 10
PICTURES = 3
_PRIVATE = 0o700


class Skipped(Exception):  # noqa: N818 - not an error: the check does not apply here
    """Raised by a check that the machine or the bundle cannot run; the message says what is missing."""


@dataclass(frozen=True)
class Measured:
    """A run: its final latents, the engines it loaded, and its peak device memory in bytes beyond that used before.

    `seconds` are those of every unit of work, by stage; `total` is their sum plus opening the bundle.
    """

    latents: NDArray[np.float32]
    loads: tuple[str, ...]
    swaps: int
    peak: int
    seconds: dict[str, list[float]]
    total: float


class Workplace:
    """A copy of the embedded bundle in `folder`, or `bundle` itself, and the runs made with it."""

    def __init__(self, folder: Path, bundle: Path | None = None) -> None:
        self.root = bundle or _copy(bundle_path(), folder / "bundle")
        self.flags = BuildFlags(weight_streaming=bundle is None)
        """Flags for missing plans: our own copy is built with weight streaming, so that all residencies can run."""
        self.cache = cache_folder()
        self._folder = folder
        self._runs: dict[tuple[str, str, int], Measured] = {}

    def require_installed(self, flavour: Flavour) -> None:
        """Raise Skipped if TensorRT of this flavour is not installed."""
        try:
            tensorrt_module(flavour)
        except IncompatibleError as exc:
            raise Skipped(f"{flavour} is not installed") from exc

    def planned(self, flavour: Flavour) -> Bundle:
        """Return the bundle. Raises Skipped if it lacks plans of this flavour for this machine."""
        self.require_installed(flavour)
        try:
            self.records(flavour)
        except IncompatibleError as exc:
            raise Skipped(str(exc)) from exc
        return read_bundle(self.root)

    def records(self, flavour: Flavour) -> dict[str, PlanRecord]:
        """Return the plans of this flavour by component. Raises IncompatibleError if one is missing."""
        bundle, environment = read_bundle(self.root), current_environment(flavour)
        return {name: find_plan(bundle, name, environment) for name in planned_components(bundle.manifest)}

    def streams(self, flavour: Flavour) -> bool:
        """Return whether the plans were built with weight streaming."""
        return all(record.key.flags.weight_streaming for record in self.records(flavour).values())

    def run(self, provider: str, residency: str = "auto", *, pictures: int = 1, again: bool = False) -> Measured:
        """Return the figures of a whole run; repeated calls return the first run's unless `again` is set."""
        key = (provider, residency, pictures)
        if again or key not in self._runs:
            self._runs[key] = self._make(provider, residency, pictures)
        return self._runs[key]

    def _make(self, provider: str, residency: str, pictures: int) -> Measured:
        least = before = _free()
        finals: list[NDArray[np.float32]] = []
        seconds: dict[str, list[float]] = {}
        started = time.perf_counter()
        with Pipeline(open_pool(read_bundle(self.root), provider, residency)) as pipeline:
            for step in pipeline.steps(Request(PROMPT, seed=SEED, steps=STEPS, count=pictures)):
                least = min(least, _free())
                seconds.setdefault(step.stage, []).append(step.seconds)
                finals += [step.picture.latents] if step.picture else []
            total, pool = time.perf_counter() - started, pipeline.pool
            return Measured(np.stack(finals), tuple(pool.loads), pool.swaps, before - least, seconds, total)

    def timings(self) -> list[str]:
        """Return the seconds of all runs, as the lines of a Markdown table."""
        lines = ["| provider | residency | pictures | load | base step | refiner step | decode | all |",
                 "|---|---|---|---|---|---|---|---|"]  # fmt: skip
        for (provider, residency, pictures), run in self._runs.items():
            load = sum(run.seconds.get("load", []))
            steps = (f"{np.median(run.seconds[name]):.4f}" if name in run.seconds else "" for name in _TIMED)
            lines.append(
                f"| {provider} | {residency} | {pictures} | {load:.2f} | {' | '.join(steps)} | {run.total:.2f} |"
            )
        return [*lines, "", f"Seconds; steps and decodes are medians. {STEPS} steps."] if self._runs else []

    def without_paths(self, text: str) -> str:
        """Return `text` with this machine's folders replaced by placeholders."""
        for path, name in ((self.root, "BUNDLE"), (self._folder, "FOLDER"), (Path.home(), "~")):
            text = text.replace(str(path), name)
        return text


_TIMED = ("base", "refiner", "decode")


@contextmanager
def counted(owner: type[Any], name: str) -> Iterator[list[None]]:
    """Count the calls of a method while the context is open: the yielded list grows by one per call."""
    calls: list[None] = []
    original = getattr(owner, name)

    def counting(*arguments: Any, **named: Any) -> Any:
        calls.append(None)
        return original(*arguments, **named)

    with mock.patch.object(owner, name, counting):
        yield calls


def _copy(source: Path, target: Path) -> Path:
    """Copy a bundle readable and writable only by this user: plans are code."""
    shutil.copytree(source, target)
    for path in (target, *target.rglob("*")):
        path.chmod(_PRIVATE if path.is_dir() else _PRIVATE & 0o600)
    return target


def _free() -> int:
    """Return the free bytes of the device."""
    return Cuda().memory()[0]
