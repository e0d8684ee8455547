"""Orders that fail, alone or in company, and a server whose engines fail."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sdxl_trt.engines import CorruptError, ResourceError
from sdxl_trt.runtime import Pipeline, Request
from sdxl_trt.server.desk import Desk, Ticket
from sdxl_trt.server.refusals import NotReady

Serve = Callable[..., Any]


def _failing(error: BaseException, times: int = 1, rows: int = 0) -> Callable[[str, int], None]:
    left = [times]

    def before(name: str, has: int) -> None:
        if left[0] > 0 and has >= rows:
            left[0] -= 1
            raise error

    return before


@pytest.mark.parametrize(
    "error", [ResourceError("out of memory"), CorruptError("NaN"), RuntimeError("anything"), SystemExit(3)]
)
def test_one_order_fails_and_the_server_goes_on(
    serve: Serve,
    calls: Any,
    pipeline: Pipeline,
    freed: list[Any],
    error: Any,
    order: Any,
    small: Request,
    draw: Any,
    pixels: Any,
) -> None:
    async def scenario(desk: Desk) -> list[np.ndarray]:
        calls.before = _failing(error)
        (failed,) = await draw(desk, order())
        assert failed.ended is not None
        assert failed.ended.outcome == "failed"
        assert failed.ended.error is not None
        if isinstance(error, Exception):
            assert failed.ended.error is error
        assert len(freed) == (0 if isinstance(error, Exception) else 1)
        (fine,) = await draw(desk, order())
        assert desk.ready
        return pixels(fine.pictures)

    np.testing.assert_array_equal(serve(scenario), pixels(pipeline.generate(small)))


@pytest.mark.parametrize("error", [ResourceError("out of memory"), SystemExit(3)])
def test_orders_that_fail_in_company_are_drawn_alone(
    serve: Serve, calls: Any, pipeline: Pipeline, error: BaseException, order: Any, small: Request, pixels: Any
) -> None:
    async def scenario(desk: Desk) -> list[Ticket]:
        gate = calls.hold()
        first = await desk.submit(order(seed=99))
        await gate.holds()
        tickets = [await desk.submit(order(seed=seed)) for seed in range(3)]
        calls.before = _failing(error, times=1000, rows=3)
        gate.opened.set()
        await first.wait()
        assert [(await ticket.wait()).outcome for ticket in tickets] == ["done"] * 3
        return tickets

    for seed, ticket in enumerate(serve(scenario)):
        np.testing.assert_array_equal(pixels(ticket.pictures), pixels(pipeline.generate(replace(small, seed=seed))))


def test_the_server_is_not_ready_while_its_engines_fail(serve: Serve, calls: Any, order: Any, draw: Any) -> None:
    async def scenario(desk: Desk) -> None:
        checked = asyncio.Event()
        desk.on_change.append(lambda: None if desk.ready else checked.set())
        calls.before = _failing(ResourceError("out of memory"), times=1000)
        (failed,) = await draw(desk, order())
        assert failed.ended is not None
        assert failed.ended.outcome == "failed"
        await checked.wait()
        assert "test failed" in desk.ready.reason
        with pytest.raises(NotReady):
            await desk.submit(order())

    serve(scenario)
