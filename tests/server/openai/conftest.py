"""/v1 on a desk of the tests, which draws at once, and on the embedded pair."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, TypeVar

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from PIL import Image

from sdxl_trt.engines.bundle import read_bundle
from sdxl_trt.mini import bundle_path
from sdxl_trt.runtime import Picture, Request
from sdxl_trt.runtime.request import resolve_request
from sdxl_trt.server import Options, http
from sdxl_trt.server.desk import Drawn, Ended, Files, Order, Stepped, Ticket, Waiting
from sdxl_trt.server.refusals import RefusedError

T = TypeVar("T")
BUNDLE = read_bundle(bundle_path())


@dataclass
class FakeDesk:
    """A desk that draws at once: grey pictures of the right size, with an estimate for every step.

    `fails` ends an order in place of its last picture; `hold` draws nothing until it is set.
    """

    picture: Picture
    options: Options = field(default_factory=Options)
    orders: list[Order] = field(default_factory=list)
    tickets: list[Ticket] = field(default_factory=list)
    refuses: Exception | None = None
    fails: Ended | None = None
    hold: asyncio.Event | None = None

    def __post_init__(self) -> None:
        pool = SimpleNamespace(limits=None, bundle=BUNDLE)
        self.pipeline = SimpleNamespace(manifest=BUNDLE.manifest, pool=pool)
        self.draining = False
        self.files = Files()

    @contextmanager
    def place(self, who: str) -> Iterator[None]:
        if self.refuses is not None:
            raise self.refuses
        yield

    async def submit(self, order: Order) -> Ticket:
        if self.refuses is not None:
            raise self.refuses
        self.orders.append(order)
        assert isinstance(order.work, Request)
        ticket = Ticket(order)
        ticket.warnings = tuple(resolve_request(order.work, self.pipeline.manifest).notes)
        self.tickets.append(ticket)
        ticket.tell(Waiting(1, 0.5))
        self._task = asyncio.create_task(self._draw(ticket))
        return ticket

    async def _draw(self, ticket: Ticket) -> None:
        while not ticket.readers:  # a desk that ended before anybody read would have no previews left
            await asyncio.sleep(0)
        if self.hold is not None:
            await self.hold.wait()
        assert isinstance(ticket.order.work, Request)
        resolved = resolve_request(ticket.order.work, self.pipeline.manifest)
        count, (height, width) = len(resolved.seeds), (resolved.height, resolved.width)
        for stage, part in (("base", resolved.base), ("refiner", resolved.refiner)):
            for step in range(part.steps if part else 0):
                shown = np.full((count, 4, height // 8, width // 8), step / 100, np.float32)
                estimate = shown if ticket.order.wants_estimates else None
                ticket.tell(Stepped(stage, step + 1, part.steps if part else 0, 0, estimate))
        for index, seed in enumerate(resolved.seeds):
            if self.fails is not None and index == count - 1:
                ticket.tell(self.fails)
            image = Image.new("RGB", (width, height), (index, 100, 100))
            ticket.tell(Drawn(index, replace(self.picture, image=image, seed=seed)))
        ticket.tell(Ended("cancelled" if ticket.stop else "done"))


def _application(desk: Any, options: Options) -> FastAPI:
    """Return an application with the routes of /v1 alone, and the plainest way to answer errors."""
    from sdxl_trt.server.openai import router
    from sdxl_trt.server.openai.answers import error_body

    app = FastAPI()
    app.state.desk = desk
    app.include_router(router(options))

    @app.middleware("http")
    async def who(request: HttpRequest, call_next: Callable[[HttpRequest], Awaitable[Any]]) -> Any:
        request.state.caller = http.Caller("peer:test", "id-1")
        return await call_next(request)

    @app.exception_handler(http.ApiError)
    async def refused(_: HttpRequest, exc: http.ApiError) -> JSONResponse:
        return JSONResponse(error_body(exc), exc.status, exc.headers)

    @app.exception_handler(RefusedError)
    async def full(_: HttpRequest, exc: RefusedError) -> JSONResponse:
        error = http.ApiError(429, str(exc), "queue_full")
        return JSONResponse(error_body(error), 429, {"Retry-After": str(exc.retry_after)})

    return app


Use = Callable[[httpx.AsyncClient, Any], Awaitable[T]]


@pytest.fixture
def served(picture: Picture) -> Callable[..., Any]:
    """Run `use(client, desk)` on an application whose desk `make_desk()` makes on the event loop; return its result."""

    def run(use: Use[T], options: Options | None = None, make_desk: Callable[[], Any] | None = None) -> T:
        async def main() -> T:
            desk = (make_desk or (lambda: FakeDesk(picture)))()
            transport = httpx.ASGITransport(_application(desk, options or Options()))
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8188") as client:
                return await use(client, desk)

        return asyncio.run(main())

    return run


@pytest.fixture
def desk_of(picture: Picture) -> Callable[..., FakeDesk]:
    return lambda **changed: FakeDesk(picture, **changed)
