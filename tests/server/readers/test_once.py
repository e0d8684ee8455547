"""A request that is repeated is drawn once."""

import asyncio
import gc
import weakref
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_trt.runtime import Picture, Request
from sdxl_trt.server import Options
from sdxl_trt.server.desk import Drawn, Ended, Order, Ticket
from sdxl_trt.server.http import ApiError
from sdxl_trt.server.readers.once import KEPT_BY_BODY, KEPT_BY_KEY, MOST_FINISHED, Asking, Once, Reader
from sdxl_trt.server.refusals import QueueFull

FOX = {"prompt": "a red fox", "size": "64x64", "steps": 2}
URL = "/v1/images/generations"
RETRY = {"x-stainless-retry-count": "1"}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def _asking(body: str = "a", key: str = "", who: str = "me", **headers: str) -> Asking:
    told = {"idempotency-key": key} if key else {}
    return Asking.of(who, URL, told | {name.replace("_", "-"): value for name, value in headers.items()}, {"p": body})


Use = Callable[[Once, Any, list[Ticket], Clock], Coroutine[Any, Any, None]]


def _run(use: Use, **options: Any) -> Any:
    async def main() -> Any:
        clock = Clock()
        tickets: list[Ticket] = []

        async def submit() -> Ticket:
            ticket = Ticket(Order(Request(), "openai", "me", str(len(tickets))))
            tickets.append(ticket)
            await asyncio.sleep(0)
            return ticket

        return await use(Once(Options(**options), clock), submit, tickets, clock)

    return asyncio.run(main())


async def _end(ticket: Ticket, outcome: Any = "done") -> None:
    ticket.tell(Ended(outcome))
    await ticket.wait()


@pytest.mark.parametrize(
    ("first", "second", "drawn"),
    [
        (_asking(key="k"), _asking(key="k"), 1),
        (_asking(key="k"), _asking(key="other"), 2),
        (_asking(key="k"), _asking(key="k", who="you"), 2),
        (_asking(), _asking(), 2),
        (_asking(), _asking(x_stainless_retry_count="1"), 1),
        (_asking(), _asking(x_stainless_retry_count="0"), 2),
        (_asking(), _asking("b", x_stainless_retry_count="1"), 2),
        (_asking(), _asking(who="you", x_stainless_retry_count="1"), 2),
    ],
)
def test_only_a_repeated_request_joins(first: Asking, second: Asking, drawn: int) -> None:
    async def use(once: Once, submit: Any, tickets: list[Ticket], _: Clock) -> None:
        one, other = await asyncio.gather(once.read(first, submit), once.read(second, submit))
        assert len(tickets) == drawn
        assert (one.ticket is other.ticket, other.replayed) == (drawn == 1, drawn == 1)
        await _end(one.ticket)
        assert ((await once.read(second, submit)).ticket is other.ticket) == (bool(second.key) or second.retries)

    _run(use)


def test_a_key_belongs_to_one_body() -> None:
    async def use(once: Once, submit: Any, *_: Any) -> None:
        await once.read(_asking(key="k"), submit)
        with pytest.raises(ApiError) as caught:
            await once.read(_asking("b", key="k"), submit)
        assert caught.value.status == 422

    _run(use)
    with pytest.raises(ApiError, match="255"):
        _asking(key="k" * 256)


@pytest.mark.parametrize("outcome", ["failed", "deadline", "cancelled", "interrupted"])
def test_what_was_not_finished_is_drawn_anew(outcome: str) -> None:
    async def use(once: Once, submit: Any, tickets: list[Ticket], _: Clock) -> None:
        reader = await once.read(_asking(key="k"), submit)
        await _end(reader.ticket, outcome)
        again = await once.read(_asking("b", key="k"), submit)
        assert (len(tickets), again.replayed) == (2, False)

    _run(use)


def test_a_refused_order_is_submitted_again() -> None:
    async def use(once: Once, submit: Any, tickets: list[Ticket], _: Clock) -> None:
        async def refuse() -> Ticket:
            raise QueueFull("full")

        for _number in range(2):
            with pytest.raises(QueueFull):
                await once.read(_asking(key="k"), refuse)
        assert not (await once.read(_asking(key="k"), submit)).replayed

    _run(use)


@pytest.mark.parametrize(
    ("asking", "kept"), [(_asking(key="k"), KEPT_BY_KEY), (_asking(x_stainless_retry_count="2"), KEPT_BY_BODY)]
)
def test_a_finished_order_is_kept_for_a_while(asking: Asking, kept: float) -> None:
    async def use(once: Once, submit: Any, tickets: list[Ticket], clock: Clock) -> None:
        await _end((await once.read(asking, submit)).ticket)
        assert (await once.read(asking, submit)).replayed
        clock.now += kept + 1
        assert not (await once.read(asking, submit)).replayed

    _run(use)


def test_no_more_than_so_many_finished_orders_are_kept() -> None:
    async def use(once: Once, submit: Any, tickets: list[Ticket], _: Clock) -> None:
        for number in range(MOST_FINISHED + 2):
            await _end((await once.read(_asking(key=f"k{number}"), submit)).ticket)
        held = [(await once.read(_asking(key=f"k{number}"), submit)).replayed for number in (MOST_FINISHED + 1, 0)]
        assert held == [True, False]

    _run(use)


def test_the_last_orders_of_a_burst_are_forgotten_when_their_readers_leave() -> None:
    async def use(once: Once, submit: Any, tickets: list[Ticket], _: Clock) -> None:
        readers = [await once.read(_asking(key=f"k{number}"), submit) for number in range(MOST_FINISHED + 3)]
        for reader in readers:
            await _end(reader.ticket)
            reader.leave()
        held = weakref.WeakSet(tickets)
        tickets.clear()
        del readers, reader
        gc.collect()
        assert len(held) == MOST_FINISHED

    _run(use)


@pytest.mark.parametrize("drawn", [True, False])
def test_finished_orders_hold_a_bounded_number_of_bytes(*, drawn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    side = 64
    monkeypatch.setattr("sdxl_trt.server.readers.once.MOST_BYTES", 2 * 3 * side**2 + 100)

    async def use(once: Once, submit: Any, tickets: list[Ticket], clock: Clock) -> None:
        async def given() -> Ticket:
            ticket = await submit()
            pixels = np.zeros((side, side, 3), np.uint8)
            if drawn:
                picture = Picture(Image.fromarray(pixels), 1, {}, np.zeros((4, 1, 1), np.float32))
                ticket.take(Drawn(0, picture))
            else:
                ticket.order = replace(ticket.order, work=Request(image=pixels))
            return ticket

        for number in range(3):
            reader = await once.read(_asking(key=f"k{number}"), given)
            await _end(reader.ticket)
            clock.now += 1
            reader.leave()
        held = [(await once.read(_asking(key=f"k{number}"), submit)).replayed for number in (2, 1, 0)]
        assert held == [True, True, False]

    _run(use)


@pytest.mark.parametrize(
    ("policy", "stop"), [(None, "cancelled"), ("finish", None), ("finish-if-started", "cancelled")]
)
def test_only_the_last_reader_stops_an_order(policy: Any, stop: str | None) -> None:
    async def use(once: Once, submit: Any, *_: Any) -> None:
        readers: list[Reader] = [await once.read(_asking(key="k"), submit) for _number in range(2)]
        for _number in range(2):
            readers[0].leave()
            assert readers[0].ticket.stop is None
        readers[1].leave()
        assert readers[0].ticket.stop == stop

    _run(use, on_disconnect=policy)
