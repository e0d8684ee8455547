"""Checks of CUDA graphs: they are captured and launched, compute what the plan computes, and survive a load."""

__all__ = ["captured_against_uncaptured", "graphs_are_used", "loading_during_captures"]

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from sdxl_trt.benchmarks.gpu_check.checks.findings import Finding, Skipped, engine_warnings, finding, require
from sdxl_trt.benchmarks.gpu_check.checks.likeness import Array, same
from sdxl_trt.benchmarks.gpu_check.checks.workplace import Workplace
from sdxl_trt.benchmarks.measure import Figure
from sdxl_trt.engines import Engine
from sdxl_trt.engines.backends.cuda import Stream
from sdxl_trt.engines.bundle import Bundle, Flavour
from sdxl_trt.engines.residency import EnginePool

_BY_ITSELF = "TensorRT for RTX captures graphs itself, where it can: there is nothing to count"
_LOADS, _MOST_LOADS = 2, 6
"""Loads beside the base's calls; more, up to the second number, if none of them was long enough for a call."""
_AFTER = 2
"""Turns after a load: a capture waits until no thread loads."""


def graphs_are_used(flavour: Flavour, workplace: Workplace) -> Finding:
    """A whole picture launches captured graphs, and no capture fails."""
    workplace.planned(flavour)
    if flavour == "tensorrt-rtx":
        raise Skipped(_BY_ITSELF)
    with counted(Stream, "launch") as launches, counted(Stream, "capture") as captures, engine_warnings() as warned:
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
    with without_graphs(), engine_warnings():
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
    with workplace.opened(flavour, "resident") as pool, engine_warnings() as warned:
        beside = _computed_while_loading(pool, (base, refiner), feeds, alone)
    refused = [text for text in warned if "graph" in text]
    found = finding(
        f"{beside.during} of {beside.calls} calls of the base during {beside.loads} loads of the refiner,"
        f" {beside.captures} captures",
        Figure("calls during loads", float(beside.during)),
        Figure("captures", float(beside.captures)),
    )
    require(not beside.differing, found, f"outputs changed: {', '.join(beside.differing)}")
    require(not refused, found, f"a capture failed: {next(iter(refused), '')}")
    require(beside.during, found, "no call began during a load: nothing was shown")
    return require(beside.captures or flavour == "tensorrt-rtx", found, "no CUDA graph was captured")


def _shapes(bundle: Bundle) -> list[Shape]:
    return [usual_shape(bundle, rows) for rows in (2, 1)]


@dataclass
class _Beside:
    """Calls of the base, how many began during loads of the refiner, and the captures and differences among them."""

    loads: int = 0
    calls: int = 0
    during: int = 0
    captures: int = 0
    differing: list[str] = field(default_factory=list)


def _computed_while_loading(
    pool: EnginePool, names: tuple[str, str], feeds: list[dict[str, Array]], alone: list[Array]
) -> _Beside:
    """Load the second engine in a thread, some times, while the first computes until the load has ended, and longer."""
    base, refiner = names
    beside = _Beside()
    with counted(Stream, "capture") as captures:
        while beside.loads < _LOADS or (not beside.during and beside.loads < _MOST_LOADS):
            pool.free()
            (engine,) = pool.phase(base, next_engines=(refiner,))
            beside.loads += 1
            after = 0
            while after < _AFTER:
                after += not pool.preparing
                _turn(engine, pool, feeds, alone, beside)
            pool.phase(refiner)  # raises what stopped the thread
    beside.captures = len(captures)
    return beside


def _turn(engine: Engine, pool: EnginePool, feeds: list[dict[str, Array]], alone: list[Array], beside: _Beside) -> None:
    """Call `engine` once with each of `feeds`, and compare with its outputs `alone`."""
    for feed, expected in zip(feeds, alone, strict=True):
        beside.during += pool.preparing
        beside.calls += 1
        agree, difference = same(call(engine, feed), expected)
        beside.differing += [] if agree else [difference]


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
