"""What a ticket keeps of an order's previews and of its places in the queue."""

import asyncio
import gc
import weakref

import numpy as np
import pytest

from sdxl_trt.runtime import Request
from sdxl_trt.server.desk import Ended, Order, Outcome, Stepped, Ticket, Waiting


@pytest.mark.parametrize("keeps", [True, False])
def test_an_order_may_keep_its_latest_preview_alone(*, keeps: bool) -> None:
    async def main() -> tuple[list[bool], bool]:
        ticket = Ticket(Order(Request(), "a1111", "a", "1", wants_estimates=True, keeps_estimates=keeps))
        reading = asyncio.ensure_future(anext(events := ticket.events()))
        await asyncio.sleep(0)
        for number in range(3):
            ticket.take(Stepped("base", number + 1, 3, estimate=np.zeros((1, 4, 8, 8), np.float32)))
        latest = ticket.progress is not None and ticket.progress.estimate is not None
        ticket.take(Ended("done"))
        seen = [await reading, *[event async for event in events]]
        return [each.estimate is not None for each in seen if isinstance(each, Stepped)], latest

    assert asyncio.run(main()) == ([keeps] * 3, True)


@pytest.mark.parametrize("early", [True, False])
def test_a_reader_who_comes_late_is_told_the_latest_place_alone(*, early: bool) -> None:
    async def main() -> list[int]:
        ticket = Ticket(Order(Request(), "openai", "a", "1"))
        events = ticket.events()
        first = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        if not early:
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            events = ticket.events()
        for place in (3, 2, 1):
            ticket.take(Waiting(place, 1.0))
        ticket.take(Ended("done"))
        seen = [*([await first] if early else []), *[event async for event in events]]
        return [each.place for each in seen if isinstance(each, Waiting)]

    assert asyncio.run(main()) == ([3, 2, 1] if early else [1])


@pytest.mark.parametrize("outcome", ["done", "failed"])
def test_a_ticket_that_has_ended_is_freed_without_a_collector(outcome: Outcome) -> None:
    async def main() -> weakref.ref[Ticket]:
        ticket = Ticket(Order(Request(), "openai", "a", "1"))
        seen: list[str] = []
        ticket.on_stop = ticket.interrupt
        ticket.listeners.append(lambda event: seen.append(f"{event} {ticket.created}"))
        ticket.take(Ended(outcome))
        assert len(seen) == 1
        return weakref.ref(ticket)

    gc.disable()
    try:
        assert asyncio.run(main())() is None
    finally:
        gc.enable()
