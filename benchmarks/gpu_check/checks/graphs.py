"""Checks of CUDA graphs: they are captured and launched, compute what the plan computes, and survive a load."""

__all__ = ["captured_against_uncaptured", "graphs_are_used", "loading_during_captures"]

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from sdxl_trt.benchmarks.gpu_check.checks.calls import (
    Shape,
    call,
    loaded,
    stage_of,
    unet_feed,
    usual_shape,
    without_graphs,
)
from sdxl_trt.benchmarks.gpu_check.checks.findings import Finding, Skipped, finding, require
from sdxl_trt.benchmarks.gpu_check.checks.likeness import Array, same
from sdxl_trt.benchmarks.gpu_check.checks.workplace import Workplace
from sdxl_trt.benchmarks.measure import Figure
from sdxl_trt.engines.backends.cuda import Stream
from sdxl_trt.engines.bundle import Bundle, Flavour
from sdxl_trt.engines.residency import EnginePool

_BY_ITSELF = "TensorRT for RTX captures graphs itself, where it can: there is nothing to count"
_LOADS, _ROUNDS = 2, 3


def graphs_are_used(flavour: Flavour, workplace: Workplace) -> Finding:
    """A whole picture launches captured graphs, and no capture fails."""
    workplace.planned(flavour)
    if flavour == "tensorrt-rtx":
        raise Skipped(_BY_ITSELF)
    with counted(Stream, "launch") as launches, counted(Stream, "capture") as captures, _warnings() as warned:
        workplace.run(flavour, again=True)
    refused = [text for text in warned if "graph" in text]
    figures = Figure("captures", float(len(captures))), Figure("launches", float(len(launches)))
    found = finding(f"{len(captures)} captures, {len(launches)} launches of CUDA graphs", *figures)
    require(not refused, found, f"a CUDA graph could not be captured: {next(iter(refused), '')}")
    return require(launches, found, "no CUDA graph was launched during a whole picture")


def captured_against_uncaptured(flavour: Flavour, workplace: Workplace) -> Finding:
    """The latents of a picture drawn with CUDA graphs equal those of one drawn without."""
    workplace.planned(flavour)
    if flavour == "tensorrt-rtx":
        raise Skipped(_BY_ITSELF)
    with counted(Stream, "launch") as launches:
        captured = workplace.run(flavour, again=True)
    with without_graphs(), _warnings():
        bare = workplace.run(flavour, again=True)
    agree, difference = same(captured.latents, bare.latents)
    found = finding(f"{len(launches)} launches against none: {difference}")
    require(launches, found, "no CUDA graph was launched: there is nothing to compare")
    return require(agree, found, "a graph must compute what its plan computes")


def loading_during_captures(flavour: Flavour, workplace: Workplace) -> Finding:
    """The base computes and captures graphs while another thread loads the refiner, as under `resident`."""
    bundle = workplace.planned(flavour)
    base, refiner = stage_of(bundle, "base").unet, stage_of(bundle, "refiner").unet
    workplace.require_fit(flavour, "resident")
    component, factor = bundle.manifest.components[base], bundle.manifest.base.vae.factor
    feeds = [unet_feed(component, shape, factor) for shape in _shapes(bundle)]
    with loaded(workplace, flavour, base) as engine:
        alone = [call(engine, feed) for feed in feeds]
    with workplace.opened(flavour, "resident") as pool, _warnings() as warned:
        calls, differing = _computed_while_loading(pool, (base, refiner), feeds, alone)
    refused = [text for text in warned if "graph" in text]
    found = finding(f"{calls} calls of the base while the refiner was loaded {_LOADS} times")
    require(not differing, found, f"outputs changed: {', '.join(differing)}")
    return require(not refused, found, f"a capture failed: {next(iter(refused), '')}")


def _shapes(bundle: Bundle) -> list[Shape]:
    return [usual_shape(bundle, rows) for rows in (2, 1)]


def _computed_while_loading(
    pool: EnginePool, names: tuple[str, str], feeds: list[dict[str, Array]], alone: list[Array]
) -> tuple[int, list[str]]:
    """Load the second engine in a thread, some times, while the first computes; return calls and differences."""
    base, refiner = names
    calls, differing = 0, []
    for _ in range(_LOADS):
        pool.free()
        (engine,) = pool.phase(base, next_engines=(refiner,))
        for turn in range(_ROUNDS * len(feeds)):
            index = turn % len(feeds)
            agree, difference = same(call(engine, feeds[index]), alone[index])
            differing += [] if agree else [difference]
            calls += 1
        pool.phase(refiner)  # raises what stopped the thread
    return calls, differing


@contextmanager
def counted(owner: type[Any], name: str) -> Iterator[list[None]]:
    """Count the calls of a method while the context is open: the yielded list grows by one per call."""
    calls: list[None] = []
    original: Callable[..., Any] = getattr(owner, name)

    def counting(*arguments: Any, **named: Any) -> Any:
        calls.append(None)
        return original(*arguments, **named)

    with mock.patch.object(owner, name, counting):
        yield calls


class _warnings(logging.Handler):  # noqa: N801 - a context manager, read as a function
    """Collects the engines' log warnings while the context is open."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Store the message."""
        self.messages.append(record.getMessage())

    def __enter__(self) -> list[str]:
        logging.getLogger("sdxl_trt.engines").addHandler(self)
        return self.messages

    def __exit__(self, *_: object) -> None:
        logging.getLogger("sdxl_trt.engines").removeHandler(self)
