"""Orders that are cancelled, interrupted or late, and a server that drains."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sdxl_trt.runtime import Pipeline, Request
from sdxl_trt.server.desk import Desk, Ticket
from sdxl_trt.server.refusals import Draining

Serve = Callable[..., Any]


@pytest.mark.parametrize("expert", ["unet", "refiner_unet"])
def test_one_of_four_is_cancelled_and_the_others_are_unchanged(
    serve: Serve, calls: Any, expert: str, order: Any, draw: Any, pixels: Any
) -> None:
    async def scenario(desk: Desk) -> None:
        orders = [order(seed=seed) for seed in range(4)]
        alone = [pixels((await draw(desk, replace(each, id=f"{each.id}-alone")))[0].pictures)[0] for each in orders]
        gate = calls.hold()
        first = await desk.submit(order(seed=99))
        await gate.holds()
        tickets = [await desk.submit(each) for each in orders]
        held = calls.hold(lambda name, rows: name == expert and rows > 2)
        gate.opened.set()
        await held.holds()
        tickets[1].cancel()
        held.opened.set()
        assert [(await ticket.wait()).outcome for ticket in (first, *tickets)] == [
            "done", "done", "cancelled", "done", "done",
        ]  # fmt: skip
        assert tickets[1].pictures == []
        rows = [rows for name, rows in calls.made if name == expert]
        assert rows[rows.index(8) + 1] == 6  # its rows are free from the next call on
        for number in (0, 2, 3):
            np.testing.assert_array_equal(pixels(tickets[number].pictures)[0], alone[number])

    serve(scenario, fixed_batch=False)


def test_a_waiting_order_is_cancelled_at_once(serve: Serve, calls: Any, order: Any) -> None:
    async def scenario(desk: Desk) -> None:
        gate = calls.hold()
        running = await desk.submit(order())
        await gate.holds()
        waiting = await desk.submit(order())
        assert desk.waiting() == 1
        waiting.cancel()
        assert (await waiting.wait()).outcome == "cancelled"
        assert desk.waiting() == 0
        gate.opened.set()
        assert (await running.wait()).outcome == "done"

    serve(scenario)


def test_an_interrupted_order_shows_its_latest_estimate(
    serve: Serve, calls: Any, pipeline: Pipeline, order: Any, small: Request, pixels: Any
) -> None:
    async def scenario(desk: Desk) -> Ticket:
        gate = calls.hold(lambda name, rows: name == "refiner_unet")
        ticket = await desk.submit(order(wants_estimates=True))
        await gate.holds()
        ticket.interrupt()
        gate.opened.set()
        assert (await ticket.wait()).outcome == "interrupted"
        return ticket

    ticket = serve(scenario)
    (shown,) = pixels(ticket.pictures)
    estimate = next(step.denoised for step in pipeline.steps(small) if step.stage == "refiner")
    job = pipeline.start(small)
    assert estimate is not None
    job.latents = estimate.copy()
    (expected,) = [np.asarray(step.picture.image) for step in pipeline.decode(job) if step.picture is not None]
    np.testing.assert_array_equal(shown, expected)
    assert not np.array_equal(shown, pixels(pipeline.generate(small))[0])


def test_an_order_interrupted_before_its_first_step_has_no_picture(serve: Serve, calls: Any, order: Any) -> None:
    async def scenario(desk: Desk) -> None:
        gate = calls.hold()
        running = await desk.submit(order(count=2))
        await gate.holds()
        waiting = await desk.submit(order())
        waiting.interrupt()
        assert (await waiting.wait()).outcome == "interrupted"
        assert waiting.pictures == []
        running.interrupt()
        gate.opened.set()
        assert (await running.wait()).outcome == "interrupted"

    serve(scenario)


def test_an_order_ends_at_its_deadline_though_the_engine_hangs(serve: Serve, calls: Any, order: Any, draw: Any) -> None:
    async def scenario(desk: Desk) -> None:
        gate = calls.hold()
        late = await desk.submit(order(deadline=600.0))
        await gate.holds()
        desk._expire(late)
        assert (await late.wait()).outcome == "deadline"
        assert not desk.ready
        assert "not returned" in desk.ready.reason
        gate.opened.set()
        (next_one,) = await draw(desk, order())
        assert next_one.ended is not None
        assert next_one.ended.outcome == "done"
        assert desk.ready

    serve(scenario)


def test_an_order_ends_at_its_deadline_in_the_queue(serve: Serve, calls: Any, order: Any) -> None:
    async def scenario(desk: Desk) -> None:
        gate = calls.hold()
        running = await desk.submit(order())
        await gate.holds()
        desk._fits = lambda pieces, now: True  # type: ignore[method-assign]
        late = await desk.submit(order(deadline=0.01))
        assert (await late.wait()).outcome == "deadline"
        assert desk.waiting() == 0
        gate.opened.set()
        assert (await running.wait()).outcome == "done"

    serve(scenario)


def test_draining_refuses_what_waits_and_finishes_what_runs(serve: Serve, calls: Any, order: Any) -> None:
    async def scenario(desk: Desk) -> None:
        gate = calls.hold()
        running = await desk.submit(order())
        await gate.holds()
        waiting = await desk.submit(order())
        draining = asyncio.ensure_future(desk.drain(30.0))
        ended = await waiting.wait()
        assert (ended.outcome, type(ended.error)) == ("failed", Draining)
        assert not desk.ready
        with pytest.raises(Draining):
            await desk.submit(order())
        gate.opened.set()
        assert await draining
        assert running.ended is not None
        assert running.ended.outcome == "done"

    serve(scenario)
