"""What the tests of every API share: recorded requests, the embedded pair opened once and watched, and a picture."""

import asyncio
import gc
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdxl_trt.runtime import Picture, Pipeline, Request, open_bundle


@pytest.fixture(scope="session")
def replay() -> Any:
    """Import the file beside this one, which is not on sys.path, once."""
    name = "replay"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("replay.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture
def left_tickets() -> Iterator[Callable[[], int]]:
    """Return a function that counts the tickets made by this test which still exist, with no help of a collector."""
    from sdxl_trt.server.desk import Ticket

    def tickets() -> set[int]:
        return {id(each) for each in gc.get_objects() if isinstance(each, Ticket)}

    gc.collect()
    gc.disable()
    before = tickets()
    yield lambda: len(tickets() - before)
    gc.enable()


@dataclass
class Gate:
    """Holds the calls of a UNet that are `meant` until it is opened; `reached` is set while it holds one."""

    meant: Callable[[str, int], bool] = lambda name, rows: True
    reached: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)

    def __call__(self, name: str, rows: int) -> None:
        if self.meant(name, rows):
            self.reached.set()
            assert self.opened.wait(30)

    async def holds(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, 30)


@dataclass
class Calls:
    """Every call of a UNet: `before` is called with the component and its rows, and may wait or raise.

    Without `real`, UNets and decoders compute something short of each row's latents, time and conditions.
    """

    real: bool = True
    before: Callable[[str, int], None] = lambda name, rows: None
    made: list[tuple[str, int]] = field(default_factory=list)

    def hold(self, meant: Callable[[str, int], bool] = lambda name, rows: True) -> Gate:
        """Return a gate that holds the calls to come."""
        self.before = gate = Gate(meant)
        return gate

    def watch(self, pipeline: Pipeline) -> None:
        """Watch the engines of a pipeline, whenever they are loaded."""
        phase, watched = pipeline.pool.phase, dict[int, Any]()

        def watching(*uses: Any, **more: Any) -> tuple[Any, ...]:
            engines = phase(*uses, **more)
            for use, engine in zip(uses, engines, strict=True):
                if watched.get(id(engine)) is not engine:
                    watched[id(engine)] = engine
                    if "unet" in str(use) and "shallow" not in str(use):
                        self._watch_unet(str(use), engine)
                    elif "decoder" in str(use):
                        self._watch_decoder(engine)
            return engines

        pipeline.pool.phase = watching  # type: ignore[method-assign]

    def _watch_unet(self, name: str, engine: Any) -> None:
        infer, bind, bound = engine.infer, engine.bind, dict[str, Any]()

        def binding(inputs: Any) -> None:
            bound.update(inputs)
            bind(inputs)

        def inferring(inputs: Any, *more: Any) -> Any:
            rows = len(inputs["timestep"])
            self.made.append((name, rows))
            self.before(name, rows)
            if self.real:
                return infer(inputs, *more)
            told = bound["encoder_hidden_states"].mean((1, 2)) + bound["time_ids"].mean(1) / 1000
            told = told[:rows] + np.asarray(inputs["timestep"], np.float32) / 1000
            return {"out_sample": np.tanh(inputs["sample"] + told.astype(np.float32)[:, None, None, None])}

        engine.infer, engine.bind = inferring, binding

    def _watch_decoder(self, engine: Any) -> None:
        infer = engine.infer

        def inferring(inputs: Any, *more: Any) -> Any:
            if self.real:
                return infer(inputs, *more)
            latents = inputs["latent_sample"][:, :3]
            return {"sample": np.tanh(latents / 8).repeat(8, axis=2).repeat(8, axis=3)}

        engine.infer = inferring


class Borrowed:
    """The engines of another pool, which stay loaded: the tests share them."""

    def __init__(self, pool: Any) -> None:
        self._pool, self._closes = pool, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def free(self, *_: Any) -> None:
        pass

    def close(self) -> None:
        self._closes += 1

    @property
    def closed(self) -> bool:
        """Whether it was closed, once."""
        return self._closes == 1


@pytest.fixture(scope="session")
def watched() -> Calls:
    """Return what the calls of all pipelines of these tests pass through; what it does to them ends with `calls`."""
    return Calls()


@pytest.fixture(scope="session")
def pipeline(watched: Calls) -> Iterator[Pipeline]:
    """The embedded pair, opened once for all tests of the server."""
    with open_bundle(residency="resident", provider="ort-cpu") as pipeline:
        watched.watch(pipeline)
        yield pipeline


@pytest.fixture
def calls(watched: Calls) -> Iterator[Calls]:
    """Return the calls of one test, which compute something short unless it makes them `real`."""
    watched.real = False
    watched.made.clear()
    yield watched
    watched.real, watched.before = True, Calls().before
    watched.made.clear()


@pytest.fixture(scope="session")
def borrow() -> Callable[[Pipeline], Pipeline]:
    """Return a function that returns a pipeline on the engines of another, which its closing leaves loaded."""
    return lambda pipeline: Pipeline(Borrowed(pipeline.pool))  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def picture(pipeline: Pipeline) -> Picture:
    """A picture with a true record; the others of the tests are made of it."""
    return next(pipeline.generate(Request("a red fox", steps=2, seed=7, width=64, height=64)))
