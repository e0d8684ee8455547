"""Orders, and a desk for them with the embedded pair."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sdxl_trt.runtime import Pipeline, Request
from sdxl_trt.server.desk import Desk, Order, Ticket
from sdxl_trt.server.desk.studio import Studio
from sdxl_trt.server.options import Options

SMALL = Request("a red star", steps=4, width=64, height=64, seed=5, handoff=0.5)


@pytest.fixture
def small() -> Request:
    """Return the request that orders have unless they say otherwise: two steps of each expert."""
    return SMALL


@pytest.fixture(scope="session")
def order() -> Callable[..., Order]:
    """Return a function that makes an order of its own id; `changed` are the order's fields and the request's."""
    ids = itertools.count()

    def made(request: Any = SMALL, who: str = "a", **changed: Any) -> Order:
        fields = {name: changed.pop(name) for name in ("deadline", "wants_estimates", "id") if name in changed}
        work = replace(request, **changed) if changed else request
        return Order(work, "openai", who, fields.pop("id", f"order-{next(ids)}"), **fields)

    return made


@pytest.fixture(scope="session")
def draw() -> Callable[..., Awaitable[list[Ticket]]]:
    """Return a function that submits orders, and returns their tickets when all have ended."""

    async def drawn(desk: Desk, *orders: Order) -> list[Ticket]:
        tickets = [await desk.submit(each) for each in orders]
        for ticket in tickets:
            await ticket.wait()
        return tickets

    return drawn


@pytest.fixture(scope="session")
def pixels() -> Callable[..., list[np.ndarray]]:
    """Return a function from pictures to their arrays."""
    return lambda pictures: [np.asarray(picture.image) for picture in pictures]


@pytest.fixture
def freed(monkeypatch: pytest.MonkeyPatch) -> list[Studio]:
    """The studios whose engines should have been unloaded, in order; they stay loaded, since loading takes seconds."""
    studios: list[Studio] = []
    monkeypatch.setattr(Studio, "free", lambda self: studios.append(self))  # noqa: PLW0108 - a method is bound
    return studios


@pytest.fixture
def serve(pipeline: Pipeline, calls: Any, freed: list[Studio]) -> Callable[..., Any]:
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
