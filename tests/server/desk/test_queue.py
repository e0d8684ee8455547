"""Which orders are taken, how many wait, and who is told to come back."""

import asyncio
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest

from sdxl_trt.server.desk import Desk, Ticket, Waiting
from sdxl_trt.server.desk.pieces import work_of
from sdxl_trt.server.desk.plan import Work
from sdxl_trt.server.desk.room import Room
from sdxl_trt.server.refusals import QueueFull, TooLate, TooMany

Serve = Callable[..., Any]


def test_a_full_queue_refuses_but_keeps_a_place_for_others(serve: Serve, calls: Any, order: Any) -> None:
    async def scenario(desk: Desk) -> None:
        gate = calls.hold()
        tickets = [await desk.submit(order())]
        await gate.holds()
        tickets += [await desk.submit(order()) for _ in range(2)]
        assert not desk.ready
        with pytest.raises(QueueFull) as refused:
            await desk.submit(order())
        assert 1 <= refused.value.retry_after <= 120
        tickets.append(await desk.submit(order(who="b")))
        with pytest.raises(QueueFull):
            await desk.submit(order(who="b"))
        assert [ticket.place.place for ticket in tickets[1:] if ticket.place is not None] == [1, 3, 2]
        gate.opened.set()
        for ticket in tickets:
            assert (await ticket.wait()).outcome == "done"

    serve(scenario, queue=2)


def test_of_a_thousand_orders_at_once_as_many_are_taken_as_the_queue_holds(
    serve: Serve, calls: Any, order: Any
) -> None:
    async def scenario(desk: Desk) -> None:
        gate = calls.hold()
        running = await desk.submit(order())
        await gate.holds()
        answers = await asyncio.gather(*(desk.submit(order()) for _ in range(1000)), return_exceptions=True)
        taken = [answer for answer in answers if isinstance(answer, Ticket)]
        refused = [answer for answer in answers if isinstance(answer, QueueFull)]
        assert (len(taken), len(refused)) == (8, 992)
        assert all(1 <= each.retry_after <= 120 for each in refused)
        gate.opened.set()
        for ticket in (running, *taken):
            assert (await ticket.wait()).outcome == "done"
        assert desk.ready

    serve(scenario, queue=8)


def test_only_requests_that_may_be_taken_are_translated(serve: Serve, calls: Any, order: Any) -> None:
    async def scenario(desk: Desk) -> None:
        gate = calls.hold()
        running = await desk.submit(order())
        await gate.holds()
        batch, held = desk.pipeline.pictures_at_once, ExitStack()
        with held:
            for _ in range(2 + batch):
                held.enter_context(desk.place("a"))
            with pytest.raises(QueueFull):
                held.enter_context(desk.place("a"))
            held.enter_context(desk.place("another"))
        tickets = [running]
        for _ in range(2):
            with desk.place("a"):
                tickets.append(await desk.submit(order()))
        with pytest.raises(QueueFull):
            await desk.submit(order())
        gate.opened.set()
        for ticket in tickets:
            assert (await ticket.wait()).outcome == "done"

    serve(scenario, queue=2)


def test_too_many_pictures_are_refused_though_few_orders_wait(serve: Serve, calls: Any, order: Any) -> None:
    async def scenario(desk: Desk) -> None:
        gate = calls.hold()
        running = await desk.submit(order())
        await gate.holds()
        waiting = await desk.submit(order(count=3))
        with pytest.raises(QueueFull):
            await desk.submit(order(count=2))
        gate.opened.set()
        for ticket in (running, waiting):
            await ticket.wait()
        assert len(waiting.pictures) == 3

    serve(scenario, queue_pictures=4)


def test_what_would_end_after_its_deadline_is_refused(serve: Serve, order: Any) -> None:
    async def scenario(desk: Desk) -> None:
        desk.predictor.observe("base", 64 * 64, 1000.0)
        with pytest.raises(TooLate) as refused:
            await desk.submit(order(deadline=5.0))
        assert refused.value.retry_after == 120
        assert desk.tickets == {}

    serve(scenario)


def test_a_request_with_a_cache_costs_its_full_and_its_shallow_steps(serve: Serve, order: Any, draw: Any) -> None:
    """10 steps of the base, 6 of them full; 10 of the refiner, of which its own interval leaves 4 full."""

    async def scenario(desk: Desk) -> None:
        for stage, seconds in (("base", 10.0), ("base_shallow", 2.0), ("refiner", 20.0), ("refiner_shallow", 5.0),
                               ("decode", 0.0)):  # fmt: skip
            for _ in range(30):  # an average forgets what the desk measured
                desk.predictor.observe(stage, 64 * 64, seconds)
        whole = order(steps=20, deadline=200.0)
        with pytest.raises(TooLate):
            await desk.submit(whole)
        cached = replace(whole.work, cache=2, refiner_cache=4)
        resolved = desk.pipeline.resolve(cached)
        assert work_of(resolved, 1) == Work(64 * 64, 1, 10, 10, base_shallow=3, refiner_shallow=6)
        (ticket,) = await draw(desk, replace(whole, work=cached))  # 7 · 10 + 3 · 2 + 4 · 20 + 6 · 5 = 186
        assert (await ticket.wait()).outcome == "done"

    serve(scenario)


def test_what_a_cache_saves_is_learned_apart(
    serve: Serve, order: Any, draw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[tuple[str, float]] = []
    taken = defaultdict[str, int](int)

    def unit(_: Room, pieces: Any, stage: str, __: str = "") -> float:
        """A full step takes 4 seconds, a shallow one 1."""
        full, before = pieces[0].job.run.full_steps.get(stage, 0), taken[stage]
        taken[stage] = full
        return 4.0 if full > before else 1.0

    async def scenario(desk: Desk) -> None:
        monkeypatch.setattr(Room, "_unit", unit)
        monkeypatch.setattr(desk.predictor, "observe", lambda stage, _, seconds: learned.append((stage, seconds)))
        await draw(desk, order(steps=12, cache=2))

    serve(scenario)
    steps = {stage: seconds for stage, seconds in learned if stage not in ("encode", "decode")}
    assert steps == {"base": 4.0, "base_shallow": 1.0, "refiner": 4.0, "refiner_shallow": 1.0}


def test_a_key_beyond_its_rate_is_refused(serve: Serve, order: Any, draw: Any) -> None:
    async def scenario(desk: Desk) -> None:
        await draw(desk, order(who="a"))
        with pytest.raises(TooMany):
            await desk.submit(order(who="a"))
        await draw(desk, order(who="b"))

    serve(scenario, rate_requests=1)


def test_places_move_up(serve: Serve, calls: Any, order: Any) -> None:
    async def scenario(desk: Desk) -> list[int]:
        gate = calls.hold()
        running = await desk.submit(order())
        await gate.holds()
        first = await desk.submit(order())
        second = await desk.submit(order())
        events = second.events()
        places = [await anext(events)]  # who reads later is told the latest place alone
        first.cancel()
        gate.opened.set()
        places += [event async for event in events]
        await running.wait()
        return [event.place for event in places if isinstance(event, Waiting)]

    assert serve(scenario) == [2, 1]
