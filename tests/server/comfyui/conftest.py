"""ComfyUI's API on a desk of the tests, which draws when it is told to, and on the embedded pair."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from sdxl_trt.engines.bundle import read_bundle
from sdxl_trt.mini import bundle_path
from sdxl_trt.runtime import Picture, Pipeline
from sdxl_trt.runtime.request import resolve_request
from sdxl_trt.server import Options
from sdxl_trt.server.desk import Desk, Drawn, Ended, Event, Graph, Order, Stepped, Ticket, Waiting
from sdxl_trt.server.http import Gate, add_handlers
from sdxl_trt.server.refusals import QueueFull

BUNDLE = read_bundle(bundle_path())
Json = dict[str, Any]
ADDRESS = "http://127.0.0.1:8188"
KEYS = frozenset({"own-key", "another-key"})
OWN = {"Authorization": "Bearer own-key"}


def node(kind: str, **inputs: Any) -> Json:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}


@pytest.fixture
def stranger() -> dict[str, str]:
    """Return the headers of somebody else."""
    return {"Authorization": "Bearer another-key"}


@pytest.fixture
def graph() -> Json:
    """The default workflow of ComfyUI, small."""
    return {
        "3": node("KSampler", seed=7, steps=2, cfg=7.0, sampler_name="euler", scheduler="normal", denoise=1.0,
                  model=["4", 0], positive=["6", 0], negative=["7", 0], latent_image=["5", 0]),
        "4": node("CheckpointLoaderSimple", ckpt_name="base"),
        "5": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "6": node("CLIPTextEncode", text="a red star", clip=["4", 1]),
        "7": node("CLIPTextEncode", text="blur", clip=["4", 1]),
        "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "9": node("SaveImage", filename_prefix="ComfyUI", images=["8", 0]),
    }  # fmt: skip


@dataclass
class FakeDesk:
    """A desk that draws at once what `events` makes of an order, or waits for `gate`."""

    picture: Picture
    options: Options
    orders: list[Order] = field(default_factory=list)
    tickets: list[Ticket] = field(default_factory=list)
    ends: Event = field(default_factory=lambda: Ended("done"))
    held: bool = False
    """Whether orders wait until `go` is called."""
    starts: bool = True
    most: int = 1000

    def __post_init__(self) -> None:
        self.pipeline = SimpleNamespace(
            manifest=BUNDLE.manifest,
            pool=SimpleNamespace(limits=None, bundle=BUNDLE, provider="ort-cpu"),
            resolve=lambda request: resolve_request(request, BUNDLE.manifest),
            read_prompts=lambda _: None,
        )
        self._tasks: set[asyncio.Task[None]] = set()

    async def submit(self, order: Order) -> Ticket:
        if sum(ticket.ended is None for ticket in self.tickets) >= self.most:
            raise QueueFull("enough wait already", 7)
        assert isinstance(order.work, Graph)
        ticket = Ticket(order)
        self.orders.append(order)
        self.tickets.append(ticket)
        ticket.tell(Waiting(1, 0.5))
        task = asyncio.create_task(self._draw(ticket))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return ticket

    async def _draw(self, ticket: Ticket) -> None:
        nodes = ticket.order.work.nodes  # type: ignore[union-attr]
        samplers = [key for key in nodes if nodes[key]["class_type"] == "KSampler"]
        if self.starts:
            ticket.tell(Stepped("encode", 1, 1, node="6"))
        while self.held and ticket.stop is None:
            await asyncio.sleep(0)
        if ticket.stop is not None:
            ticket.tell(Ended("cancelled"))
            return
        for step in (1, 2):
            ticket.tell(Stepped("base", step, 2, node=samplers[0]))
        ticket.tell(Stepped("decode", 1, 1, node="8"))
        ticket.tell(Drawn(0, self.picture, "9"))
        ticket.tell(self.ends)


def application(options: Options, make_desk: Callable[[], Any]) -> FastAPI:
    from sdxl_trt.server.comfyui import router

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> Any:
        app.state.desk = make_desk()
        yield
        if isinstance(app.state.desk, Desk):
            app.state.desk.close()

    app = FastAPI(lifespan=lifespan)
    app.include_router(router(options))
    add_handlers(app, options)
    app.add_middleware(Gate, options=options)
    return app


def client_of(app: FastAPI, options: Options) -> TestClient:
    """Return a client with the first of two keys, if the server has keys."""
    # Starlette's client opens websockets at a name of its own, which is none of this server's.
    return TestClient(app, ADDRESS, headers={"Host": "127.0.0.1:8188", **(OWN if options.keys else {})})


def _faked(picture: Picture) -> Iterator[Callable[..., tuple[TestClient, FakeDesk]]]:
    with ExitStack() as stack:

        def made(options: Options | None = None, **desk: Any) -> tuple[TestClient, FakeDesk]:
            options = options or Options(keys=KEYS)
            fake = FakeDesk(picture, options, **desk)
            return stack.enter_context(client_of(application(options, lambda: fake), options)), fake

        yield made


@pytest.fixture
def fake(picture: Picture) -> Iterator[Callable[..., tuple[TestClient, FakeDesk]]]:
    """Return a client, and the desk of the tests behind it."""
    yield from _faked(picture)


@pytest.fixture(scope="module")
def shared_fake(picture: Picture) -> Iterator[Callable[..., tuple[TestClient, FakeDesk]]]:
    """Return the same for tests that change nothing, which share one client."""
    yield from _faked(picture)


@pytest.fixture
def alone(picture: Picture) -> Callable[[], FastAPI]:
    """Return an application with the desk of the tests, to be called on the event loop."""

    def made() -> FastAPI:
        app = application(Options(), lambda: None)
        app.state.desk = FakeDesk(picture, Options())
        return app

    return made


@pytest.fixture(scope="module")
def drawing(pipeline: Pipeline) -> Iterator[TestClient]:
    """Return a client of the embedded pair."""
    options = Options()
    with client_of(application(options, lambda: Desk(pipeline, options)), options) as client:
        yield client
