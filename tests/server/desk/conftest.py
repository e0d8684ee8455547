"""The embedded pair behind a desk, and a hook that is called before each call of a UNet."""

import asyncio
import itertools
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from sdxl_trt.runtime import Pipeline, Request, open_bundle
from sdxl_trt.server.desk import Desk, Order
from sdxl_trt.server.desk.studio import Studio
from sdxl_trt.server.options import Options

SMALL = Request("a red star", steps=4, width=64, height=64, seed=5, handoff=0.5)
_ids = itertools.count()


def order(request: Any = SMALL, who: str = "a", **changes: Any) -> Order:
    fields = {name: changes.pop(name) for name in ("deadline", "wants_estimates", "id") if name in changes}
    work = replace(request, **changes) if changes else request
    return Order(work, "openai", who, fields.pop("id", f"order-{next(_ids)}"), **fields)


@dataclass
class Calls:
    """Every call of a UNet: `before` is called with the component and its rows, and may wait or raise.

    Without `real`, UNets and decoders compute something short of each row, so that timing costs no time.
    """

    real: bool = False
    before: Callable[[str, int], None] = lambda name, rows: None
    made: list[tuple[str, int]] = field(default_factory=list)

    def watch(self, pipeline: Pipeline) -> None:
        phase, watched = pipeline.pool.phase, dict[int, Any]()

        def watching(*uses: Any, **more: Any) -> tuple[Any, ...]:
            engines = phase(*uses, **more)
            for use, engine in zip(uses, engines, strict=True):
                if watched.get(id(engine)) is not engine:
                    watched[id(engine)] = engine
                    if "unet" in str(use):
                        engine.infer = self._unet(str(use), engine.infer)
                    elif "decoder" in str(use):
                        engine.infer = self._decoder(engine.infer)
            return engines

        pipeline.pool.phase = watching  # type: ignore[method-assign]

    def _unet(self, name: str, infer: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def infer_watched(inputs: Any) -> Any:
            rows = len(inputs["timestep"])
            self.made.append((name, rows))
            self.before(name, rows)
            return infer(inputs) if self.real else {"out_sample": np.tanh(inputs["sample"])}

        return infer_watched

    def _decoder(self, infer: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def infer_watched(inputs: Any) -> Any:
            if self.real:
                return infer(inputs)
            latents = inputs["latent_sample"][:, :3]
            return {"sample": np.tanh(latents / 8).repeat(8, axis=2).repeat(8, axis=3)}

        return infer_watched


@dataclass
class Gate:
    """Holds a call until somebody opens the gate; `reached` is set while it holds one."""

    reached: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)

    def __call__(self, name: str, rows: int) -> None:
        self.reached.set()
        assert self.opened.wait(30)

    async def holds(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, 30)


@pytest.fixture(scope="session")
def opened() -> Iterator[tuple[Pipeline, Calls]]:
    with open_bundle(residency="resident") as pipeline:
        calls = Calls()
        calls.watch(pipeline)
        yield pipeline, calls


@pytest.fixture
def pipeline(opened: tuple[Pipeline, Calls]) -> Pipeline:
    return opened[0]


@pytest.fixture
def calls(opened: tuple[Pipeline, Calls]) -> Iterator[Calls]:
    yield opened[1]
    opened[1].before, opened[1].real = Calls().before, False
    opened[1].made.clear()


@pytest.fixture
def freed(monkeypatch: pytest.MonkeyPatch) -> list[Studio]:
    """The studios whose engines should have been unloaded, in order; they stay loaded, since loading takes seconds."""
    studios: list[Studio] = []
    monkeypatch.setattr(Studio, "free", lambda self: studios.append(self))  # noqa: PLW0108 - a method is bound
    return studios


@pytest.fixture
def serve(pipeline: Pipeline, calls: Calls, freed: list[Studio]) -> Callable[..., Any]:
    """Return a function that runs a coroutine function with a warm desk, and closes it."""

    def run(scenario: Callable[[Desk], Awaitable[Any]], **options: Any) -> Any:
        async def main() -> Any:
            desk = Desk(pipeline, Options(**options))
            try:
                assert await asyncio.wait_for(desk.warm(), 60)
                calls.made.clear()
                return await asyncio.wait_for(scenario(desk), 60)
            finally:
                desk.close()

        return asyncio.run(main())

    return run
