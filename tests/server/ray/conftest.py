"""An ingress and its pools in one process: what they send each other is pickled, and arrives read-only as with Ray."""

import asyncio
import pickle
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from sdxl_trt.runtime import Pipeline, open_bundle
from sdxl_trt.server.desk import Desk
from sdxl_trt.server.options import Options
from sdxl_trt.server.ray.desk import RayDesk, open_ingress
from sdxl_trt.server.ray.errands import Errand
from sdxl_trt.server.ray.layout import ASSUMED, choose_layout
from sdxl_trt.server.ray.outlet import Outlet
from sdxl_trt.server.ray.pool import Pool
from sdxl_trt.server.ray.room import Pools


class Full(Exception):  # noqa: N818 - stands for Ray's
    """The queues of a pool are full."""


def sent(value: Any) -> Any:
    """Return what arrives of a value: its arrays are read-only."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(data, buffers=[bytes(buffer) for buffer in buffers])


@dataclass
class Wire:
    """What happens to errands on their way: `before` may raise, and `after` sees each answer."""

    before: Callable[[Errand], None] = lambda errand: None
    after: Callable[[Errand, Any], None] = lambda errand, event: None
    errands: list[Errand] = field(default_factory=list)


class Answer:
    """An answer as Ray gives it: a stream that can be cancelled."""

    def __init__(self, pool: Pool, errand: Errand, wire: Wire) -> None:
        self._pool, self._errand, self._wire = pool, sent(errand), wire
        self._task: asyncio.Task[None] | None = None
        self._queue: asyncio.Queue[Any] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[Any]:
        self._wire.errands.append(self._errand)
        self._wire.before(self._errand)
        self._task = asyncio.create_task(self._pump())
        while (event := await self._queue.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event

    async def _pump(self) -> None:
        try:
            async for event in self._pool.draw(self._errand):
                self._wire.after(self._errand, event)
                self._queue.put_nowait(sent(event))
        except Exception as exc:  # noqa: BLE001 - it is raised where the answer is read
            self._queue.put_nowait(exc)
        self._queue.put_nowait(None)

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()


@dataclass
class Hold:
    """Holds a call of a UNet until somebody opens it; `reached` is set while it holds one."""

    at: int = 0
    calls: int = 0
    reached: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)

    def __call__(self) -> None:
        self.calls += 1
        if self.at and self.calls == self.at:
            self.reached.set()
            assert self.opened.wait(30)


@dataclass
class Far:
    """The pipelines of the pools, kept loaded, and what their UNets are asked."""

    base: Pipeline
    refiner: Pipeline
    real: bool = False
    """Whether UNets and decoders compute what they should."""
    hold: Hold = field(default_factory=Hold)
    wire: Wire = field(default_factory=Wire)

    def run(self, scenario: Callable[[Desk], Awaitable[Any]], layout: str = "split", **options: Any) -> Any:
        """Run a coroutine function with a warm desk, and close it."""
        return asyncio.run(self._run(scenario, layout, Options(**options)))

    async def _run(self, scenario: Callable[[Desk], Awaitable[Any]], layout: Any, options: Options) -> Any:
        pools: list[Pool] = []

        def make() -> Pools:
            names = [("base", self.base), ("refiner", self.refiner)] if layout == "split" else [("both", self.base)]
            for name, pipeline in names:
                pools.append(Pool(name, options, lambda _, it=pipeline: it, _no_graphs))  # type: ignore[arg-type, misc]
            outlets = [Outlet(lambda errand, it=pool: Answer(it, errand, self.wire), 8, Full) for pool in pools]

            async def ready() -> None:
                for pool in pools:
                    await pool.start()

            return Pools(outlets[0], outlets[1] if layout == "split" else None, ready)

        devices = 2 if layout == "split" else 1
        desk = RayDesk(open_ingress(options), options, choose_layout(layout, devices, ASSUMED, 4), make)
        try:
            assert await asyncio.wait_for(desk.warm(), 60)
            self.hold.calls = 0
            return await asyncio.wait_for(scenario(desk), 60)
        finally:
            self.hold.opened.set()
            desk.close()
            for pool in pools:
                pool.close()


def _no_graphs(*_: object) -> Iterator[Any]:
    raise AssertionError


def _watched(pipeline: Pipeline, far: list[Far]) -> None:
    """Keep the engines of a pipeline loaded; UNets and VAEs compute something short, unless `far` says `real`.

    What a UNet computes depends on its row alone: on latents, time and conditions.
    """
    pipeline.pool.close = lambda: None  # type: ignore[method-assign]
    phase, watched = pipeline.pool.phase, dict[int, Any]()

    def watching(*uses: Any, **more: Any) -> Any:
        engines = phase(*uses, **more)
        for use, engine in zip(uses, engines, strict=True):
            if watched.get(id(engine)) is not engine:
                watched[id(engine)] = engine
                _watch(str(use), engine, far)
        return engines

    pipeline.pool.phase = watching  # type: ignore[method-assign]


def _watch(name: str, engine: Any, far: list[Far]) -> None:
    infer, bind, bound = engine.infer, engine.bind, dict[str, Any]()

    def binding(inputs: Any) -> None:
        bound.update(inputs)
        bind(inputs)

    def inferring(inputs: Any, *more: Any) -> Any:
        if name == "unet" and far:
            far[0].hold()
        if far and far[0].real:
            return infer(inputs, *more)
        if "unet" in name:
            kept = bound["encoder_hidden_states"].mean((1, 2)) + bound["time_ids"].mean(1) / 1000
            kept = kept[: len(inputs["sample"])]
            return {"out_sample": np.tanh(inputs["sample"] + _rows(kept) + _rows(inputs["timestep"]) / 1000)}
        if "decoder" in name:
            return {"sample": np.tanh(inputs["latent_sample"][:, :3] / 8).repeat(8, axis=2).repeat(8, axis=3)}
        return infer(inputs, *more)

    engine.infer, engine.bind = inferring, binding


def _rows(values: Any) -> Any:
    return np.asarray(values, np.float32)[:, None, None, None]


@pytest.fixture(scope="session")
def opened() -> Iterator[tuple[Pipeline, Pipeline, list[Far]]]:
    with open_bundle(residency="resident", provider="ort-cpu") as base:
        with open_bundle(residency="resident", provider="ort-cpu") as refiner:
            current: list[Far] = []
            closes = [base.pool.close, refiner.pool.close]
            _watched(base, current)
            _watched(refiner, current)
            yield base, refiner, current
        for close in closes:
            close()


@pytest.fixture
def far(opened: tuple[Pipeline, Pipeline, list[Far]]) -> Iterator[Far]:
    base, refiner, current = opened
    current[:] = [Far(base, refiner)]
    yield current[0]
    current.clear()


@pytest.fixture(scope="session")
def full() -> type[Exception]:
    return Full
