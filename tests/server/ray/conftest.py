"""An ingress and its pools in one process: what they send each other is pickled, and arrives read-only as with Ray."""

import asyncio
import pickle
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

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
    """The pipelines of the pools, and what their UNets are asked."""

    base: Pipeline
    refiner: Pipeline
    calls: Any
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


@pytest.fixture(scope="session")
def second(watched: Any) -> Iterator[Pipeline]:
    """The engines of a second device."""
    with open_bundle(residency="resident", provider="ort-cpu") as pipeline:
        watched.watch(pipeline)
        yield pipeline


@pytest.fixture
def far(pipeline: Pipeline, second: Pipeline, borrow: Callable[[Pipeline], Pipeline], calls: Any) -> Far:
    """Return the pipelines of two devices; what is done to them ends with the test."""
    far = Far(borrow(pipeline), borrow(second), calls)
    calls.before = lambda name, rows: far.hold() if name == "unet" else None
    return far


@pytest.fixture(scope="session")
def full() -> type[Exception]:
    return Full
