"""A1111's API on a desk of the tests, which draws when it is told to, and on the embedded pair."""

import asyncio
import base64
import io
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image
from starlette.testclient import TestClient

from sdxl_trt.engines.bundle import read_bundle
from sdxl_trt.mini import bundle_path
from sdxl_trt.runtime import Picture, Pipeline, Request
from sdxl_trt.runtime.request import resolve_request
from sdxl_trt.server import Options
from sdxl_trt.server.desk import Desk, Drawn, Ended, Order, Stepped, Ticket, Waiting
from sdxl_trt.server.http import Gate, add_handlers

BUNDLE = read_bundle(bundle_path())
ADDRESS = "http://127.0.0.1:8188"
KEYS = frozenset({"own-key", "another-key"})
SMALL = {"prompt": "a red star", "negative_prompt": "blur", "seed": 7, "steps": 2, "width": 64, "height": 64}


def opened(text: str) -> Image.Image:
    """Return a picture of an answer."""
    return Image.open(io.BytesIO(base64.b64decode(text)))


def as_base64(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="session")
def gradient() -> Image.Image:
    return Image.linear_gradient("L").resize((64, 64)).convert("RGB")


@dataclass
class FakeDesk:
    """A desk that draws grey pictures at once, or `steps` steps and then nothing until somebody stops it.

    It waits in the queue if it does not `start`. Interrupted, it draws the pictures it has begun with.
    """

    picture: Picture
    options: Options
    orders: list[Order] = field(default_factory=list)
    tickets: list[Ticket] = field(default_factory=list)
    ends: Ended = field(default_factory=lambda: Ended("done", seconds={"queue": 0.25, "load": 0.5}))
    held: bool = False
    starts: bool = True
    backwards: bool = False

    def __post_init__(self) -> None:
        pool = SimpleNamespace(limits=None, bundle=BUNDLE)
        self.pipeline = SimpleNamespace(manifest=BUNDLE.manifest, pool=pool)
        self._tasks: set[asyncio.Task[None]] = set()

    async def submit(self, order: Order) -> Ticket:
        ticket = Ticket(order)
        self.orders.append(order)
        self.tickets.append(ticket)
        ticket.tell(Waiting(3, 12.5))
        task = asyncio.create_task(self._draw(ticket))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return ticket

    async def _draw(self, ticket: Ticket) -> None:
        assert isinstance(ticket.order.work, Request)
        resolved = resolve_request(ticket.order.work, self.pipeline.manifest)
        count, (height, width) = len(resolved.seeds), (resolved.height, resolved.width)
        estimate = np.zeros((1, 4, height // 8, width // 8), np.float32)
        if self.starts:
            ticket.tell(Stepped("base", 1, resolved.base.steps, 0, estimate))
        while self.held and ticket.stop is None:
            await asyncio.sleep(0)
        if ticket.stop == "cancelled" or (ticket.stop and not self.starts):
            ticket.tell(Ended("cancelled" if ticket.stop == "cancelled" else "interrupted"))
            return
        for index in range(count - 1, -1, -1) if self.backwards else range(count):
            image = Image.new("RGB", (width, height), (index, 100, 100))
            picture = replace(self.picture, image=image, seed=resolved.seeds[0] + index)
            ticket.tell(Drawn(index, picture))
        ticket.tell(Ended("interrupted") if ticket.stop else self.ends)


def application(options: Options, make_desk: Callable[[], Any], *apis: Any) -> FastAPI:
    from sdxl_trt.server.a1111 import router

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> Any:
        app.state.desk = make_desk()
        yield
        if isinstance(app.state.desk, Desk):
            app.state.desk.close()

    app = FastAPI(lifespan=lifespan)
    for made in (router, *apis):
        app.include_router(made(options))
    add_handlers(app, options)
    app.state.finished = []
    app.add_middleware(Gate, options=options, tell=app.state.finished.append)
    return app


@pytest.fixture
def fake(picture: Picture) -> Iterator[Callable[..., tuple[TestClient, FakeDesk]]]:
    """Return a client, and the desk of the tests behind it."""
    with ExitStack() as stack:

        def made(options: Options | None = None, **desk: Any) -> tuple[TestClient, FakeDesk]:
            options = options or Options()
            behind = FakeDesk(picture, options, **desk)
            return stack.enter_context(TestClient(application(options, lambda: behind), ADDRESS)), behind

        yield made


@pytest.fixture(scope="module")
def drawing(pipeline: Pipeline) -> Iterator[TestClient]:
    """Return a client of the embedded pair, for A1111's API and OpenAI's."""
    from sdxl_trt.server.openai import router

    options = Options(max_body=4 << 20)
    with TestClient(application(options, lambda: Desk(pipeline, options), router), ADDRESS) as client:
        yield client


@pytest.fixture(scope="session")
def info_of() -> Callable[[Any], dict[str, Any]]:
    """Return the settings that an answer states, which are JSON within JSON."""
    return lambda answer: json.loads(answer.json()["info"])
