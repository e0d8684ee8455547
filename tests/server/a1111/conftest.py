"""A1111's API on a desk of the tests, which draws when it is told to, and on the embedded pair."""

import asyncio
import json
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
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

    @contextmanager
    def place(self, who: str) -> Iterator[None]:
        yield

    async def submit(self, order: Order) -> Ticket:
        assert isinstance(order.work, Request)
        resolved = resolve_request(order.work, BUNDLE.manifest, None, BUNDLE)
        ticket = Ticket(order)
        ticket.warnings = tuple(resolved.notes)
        self.orders.append(order)
        self.tickets.append(ticket)
        ticket.tell(Waiting(3, 12.5))
        task = asyncio.create_task(self._draw(ticket))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return ticket

    async def cancel(self) -> None:
        for ticket in self.tickets:
            ticket.cancel()

    async def _draw(self, ticket: Ticket) -> None:
        assert isinstance(ticket.order.work, Request)
        resolved = resolve_request(ticket.order.work, self.pipeline.manifest)
        count, (height, width) = len(resolved.seeds), (resolved.height, resolved.width)
        estimate = np.zeros((1, 4, height // 8, width // 8), np.float32)
        if self.starts:
            ticket.tell(Stepped("base", 1, resolved.base.steps, 0, estimate))
        if self.held:
            stopped = asyncio.Event()
            ticket.on_stop = stopped.set
            await stopped.wait()
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
    """Return a client, and the desk of the tests behind it; what is still held at the end of a test is cancelled."""
    with ExitStack() as stack:

        def made(options: Options | None = None, **desk: Any) -> tuple[TestClient, FakeDesk]:
            options = options or Options()
            behind = FakeDesk(picture, options, **desk)
            client = stack.enter_context(TestClient(application(options, lambda: behind), ADDRESS))
            assert client.portal is not None
            stack.callback(client.portal.call, behind.cancel)
            return client, behind

        yield made


@pytest.fixture
def alone(picture: Picture) -> Callable[..., tuple[FastAPI, FakeDesk]]:
    """Return an application to be called on the event loop, and the desk of the tests behind it."""

    def made(options: Options, **desk: Any) -> tuple[FastAPI, FakeDesk]:
        app = application(options, lambda: None)
        app.state.desk = FakeDesk(picture, options, **desk)
        return app, app.state.desk

    return made


@pytest.fixture(scope="session")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an embedding of two vectors, called sketchy."""
    folder, random = tmp_path_factory.mktemp("embeddings"), np.random.default_rng(5)
    manifest, head, data = BUNDLE.manifest, {}, b""
    for name, encoder in zip(("clip_l", "clip_g"), manifest.base.text_encoders, strict=True):
        width = manifest.components[encoder.component].config["hidden_size"]
        vectors = random.normal(0.0, 0.5, (2, int(width))).astype(np.float32).tobytes()
        head[name] = {"dtype": "F32", "shape": [2, width], "data_offsets": [len(data), len(data) + len(vectors)]}
        data += vectors
    told = json.dumps(head).encode()
    (folder / "sketchy.safetensors").write_bytes(struct.pack("<Q", len(told)) + told + data)
    return folder


@pytest.fixture(scope="session")
def drawing(pipeline: Pipeline, embeddings: Path) -> Iterator[TestClient]:
    """Return a client of the embedded pair, for A1111's API and OpenAI's; its LoRA is called sticker."""
    from sdxl_trt.server.openai import router

    options = Options(lora_dir=Path(bundle_path()).parent / "loras", embedding_dir=embeddings)
    with TestClient(application(options, lambda: Desk(pipeline, options), router), ADDRESS) as client:
        yield client


@pytest.fixture(scope="session")
def info_of() -> Callable[[Any], dict[str, Any]]:
    """Return the settings that an answer states, which are JSON within JSON."""
    return lambda answer: json.loads(answer.json()["info"])
