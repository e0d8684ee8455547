"""Orders through an ingress and its pools, without Ray: the same pixels, and what happens when something goes wrong."""

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sdxl_trt.engines import EngineError, UsageError
from sdxl_trt.runtime import Pipeline, Request
from sdxl_trt.runtime.images import as_input, as_mask
from sdxl_trt.server.desk import Desk, Drawn, Order, Stepped, Ticket, Waiting
from sdxl_trt.server.ray import outlet
from sdxl_trt.server.refusals import QueueFull

SMALL = Request("a red star", steps=4, width=64, height=64, seed=5, handoff=0.5)
GREY = np.full((64, 64, 3), 90, np.uint8)
HALF = np.repeat(np.array([[0] * 32 + [255] * 32], np.uint8), 64, axis=0)
_ids = itertools.count()
Far = Any


def order(request: Request = SMALL, who: str = "a", **more: Any) -> Order:
    return Order(request, more.pop("api", "openai"), who, f"order-{next(_ids)}", **more)


def _pixels(pictures: Any) -> list[np.ndarray]:
    return [np.asarray(picture.image) for picture in pictures]


async def _drawn(desk: Desk, *orders: Order) -> list[Ticket]:
    tickets = [await desk.submit(each) for each in orders]
    for ticket in tickets:
        await ticket.wait()
    return tickets


REQUESTS = {
    "base and refiner": SMALL,
    "two pictures": replace(SMALL, count=2),
    "base alone": replace(SMALL, handoff=None),
    "noise in every step": replace(SMALL, sampler="dpmpp_2s_ancestral", negative="blur", steps=5),
    "ComfyUI's noise, one batch": replace(SMALL, compat="comfyui", count=2, sampler="euler_ancestral"),
    "the refiner adds noise": replace(SMALL, compat="comfyui", refiner_add_noise=True),
    "a picture to start from": replace(SMALL, image=as_input(GREY), strength=0.7),
    "a mask": replace(SMALL, image=as_input(GREY), mask=as_mask(HALF), strength=0.9),
    "the refiner alone": replace(SMALL, handoff="auto", image=as_input(GREY), refine=True, strength=0.5),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_pools_draw_the_pixels_and_the_record_of_one_device(far: Far, name: str) -> None:
    async def scenario(desk: Desk) -> list[Ticket]:
        return await _drawn(desk, order(REQUESTS[name]))

    (ticket,) = far.run(scenario)
    assert ticket.ended.outcome == "done", ticket.ended.error
    alone = [*far.base.generate(REQUESTS[name])]
    assert len(alone) == len(ticket.pictures)
    assert all(map(np.array_equal, _pixels(ticket.pictures), _pixels(alone)))
    assert [each.metadata for each in ticket.pictures] == [each.metadata for each in alone]
    assert [each.graph for each in ticket.pictures] == [each.graph for each in alone]


def test_the_embedded_pair_draws_the_same_in_pools(far: Far) -> None:
    far.calls.real = True

    async def scenario(desk: Desk) -> list[Ticket]:
        return await _drawn(desk, order())

    (ticket,) = far.run(scenario)
    assert np.array_equal(_pixels(ticket.pictures)[0], _pixels(far.base.generate(SMALL))[0])


def test_each_pool_does_its_part_and_latents_travel_without_noise(far: Far) -> None:
    async def scenario(desk: Desk) -> list[Ticket]:
        return await _drawn(desk, order(), order(replace(SMALL, handoff=None)))

    far.run(scenario)
    assert sorted(errand.part for errand in far.wire.errands) == ["all", "base", "refiner"]
    (refined,) = [errand for errand in far.wire.errands if errand.part == "refiner"]
    (job,) = [far.base.start(SMALL)]
    for each in (far.base.encode([job]), far.base.base(job)):
        list(each)
    assert np.array_equal(refined.handover.latents, job.latents)
    assert not refined.handover.latents.flags.writeable


def test_one_pool_may_hold_both_experts(far: Far) -> None:
    async def scenario(desk: Desk) -> list[Ticket]:
        return await _drawn(desk, order(), order(replace(SMALL, seed=6)))

    tickets = far.run(scenario, layout="together")
    assert [errand.part for errand in far.wire.errands] == ["all", "all"]
    assert np.array_equal(_pixels(tickets[0].pictures)[0], _pixels(far.base.generate(SMALL))[0])
    assert all(ticket.ended.outcome == "done" for ticket in tickets)


def test_an_order_is_told_from_its_place_to_its_picture(far: Far) -> None:
    async def scenario(desk: Desk) -> list[Any]:
        ticket = await desk.submit(order(replace(SMALL, count=2), wants_estimates=True))
        return [event async for event in ticket.events()]

    events = far.run(scenario)
    assert isinstance(events[0], Waiting)
    steps = [event for event in events if isinstance(event, Stepped) and event.stage in ("base", "refiner")]
    for first in (0, 1):
        shown = [(each.stage, each.index, each.total) for each in steps if each.first == first]
        assert shown == [("base", 1, 2), ("base", 2, 2), ("refiner", 1, 2), ("refiner", 2, 2)]
    assert sorted(event.index for event in events if isinstance(event, Drawn)) == [0, 1]
    assert {"queue", "encode", "base", "refiner", "decode"} <= events[-1].seconds.keys()


def test_a_cancelled_order_stops_its_device_at_the_next_step(far: Far) -> None:
    async def scenario(desk: Desk) -> tuple[Ticket, int]:
        far.hold.at = 3
        ticket = await desk.submit(order(replace(SMALL, steps=40, handoff=None)))
        assert await asyncio.to_thread(far.hold.reached.wait, 30)
        ticket.cancel()
        await ticket.wait()
        far.hold.opened.set()
        await _drawn(desk, order(replace(SMALL, handoff=None)))
        return ticket, far.hold.calls

    ticket, calls = far.run(scenario)
    assert ticket.ended.outcome == "cancelled"
    assert calls <= 4 + 4


def test_an_interrupted_order_gets_its_estimate(far: Far) -> None:
    async def scenario(desk: Desk) -> Ticket:
        far.hold.at = 4
        ticket = await desk.submit(order(replace(SMALL, steps=40), api="a1111"))
        assert await asyncio.to_thread(far.hold.reached.wait, 30)
        while ticket.progress is None or ticket.progress.index < 3:
            await asyncio.sleep(0)
        ticket.interrupt()
        far.hold.opened.set()
        await ticket.wait()
        return ticket

    ticket = far.run(scenario)
    assert (ticket.ended.outcome, len(ticket.pictures)) == ("interrupted", 1)
    assert far.wire.errands[-1].part == "decode"
    assert ticket.progress is not None
    steps = [step for step in far.base.steps(replace(SMALL, steps=40)) if step.stage == "base"]
    estimate = far.wire.errands[-1].estimate
    assert any(np.array_equal(estimate, step.denoised) for step in steps[:5])


def test_a_pool_that_is_full_is_asked_again(far: Far, full: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlet, "AGAIN_SECONDS", 0.01)
    refusals = iter([True, True, False, True])

    def before(errand: Any) -> None:
        if next(refusals, False):
            raise full

    far.wire.before = before

    async def scenario(desk: Desk) -> list[Ticket]:
        return await _drawn(desk, order())

    (ticket,) = far.run(scenario)
    assert ticket.ended.outcome == "done"
    assert [errand.part for errand in far.wire.errands] == ["base", "base", "base", "refiner", "refiner"]


@pytest.mark.parametrize("part", ["base", "refiner"])
def test_a_device_that_is_lost_costs_no_picture_and_two_cost_one(far: Far, part: str) -> None:
    left = [2]

    def after(errand: Any, event: Any) -> None:
        if errand.part == part and isinstance(event, Stepped) and event.stage == part and left[0]:
            left[0] -= 1
            raise ConnectionError("the device died")

    far.wire.after = after

    async def scenario(desk: Desk) -> list[Ticket]:
        first = await _drawn(desk, order())
        left[0] = 1
        return first + await _drawn(desk, order())

    lost, drawn = far.run(scenario)
    assert (lost.ended.outcome, type(lost.ended.error)) == ("failed", EngineError)
    assert drawn.ended.outcome == "done"
    assert np.array_equal(_pixels(drawn.pictures)[0], _pixels(far.base.generate(SMALL))[0])


def test_what_a_pool_refuses_ends_the_order_with_its_error(far: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve: Callable[..., Any] = far.base.resolve
    begun: list[Request] = []

    def refuse(request: Request) -> Any:
        begun.append(request)
        raise UsageError("the plans of this device take another size")

    monkeypatch.setattr(far.base, "resolve", refuse)

    async def scenario(desk: Desk) -> list[Ticket]:
        first = await _drawn(desk, order(replace(SMALL, count=2)))
        monkeypatch.setattr(far.base, "resolve", resolve)
        return first + await _drawn(desk, order())

    failed, drawn = far.run(scenario)
    assert (failed.ended.outcome, type(failed.ended.error)) == ("failed", UsageError)
    assert "another size" in str(failed.ended.error)
    assert drawn.ended.outcome == "done"


def test_a_full_queue_refuses_and_predicts_when_to_come_back(far: Far) -> None:
    async def scenario(desk: Desk) -> tuple[list[Ticket], list[int]]:
        far.hold.at = 1
        tickets, refused = list[Ticket](), list[int]()
        for number in range(20):
            try:
                tickets.append(await desk.submit(order(replace(SMALL, seed=number), who="a")))
            except QueueFull as exc:
                refused.append(exc.retry_after)
        far.hold.opened.set()
        for ticket in tickets:
            await ticket.wait()
        return tickets, refused

    tickets, refused = far.run(scenario, queue=4)
    assert len(refused) == 20 - len(tickets) > 0
    assert all(1 <= seconds <= 120 for seconds in refused)
    assert {ticket.ended.outcome for ticket in tickets} == {"done"}


def test_an_order_that_is_late_ends_at_its_deadline_and_stops_its_device(far: Far) -> None:
    async def scenario(desk: Desk) -> Ticket:
        far.hold.at = 2
        desk.predictor.observe("base", 64 * 64, 1e-6)
        ticket = await desk.submit(order(deadline=0.5))
        await ticket.wait()
        far.hold.opened.set()
        return ticket

    assert far.run(scenario).ended.outcome == "deadline"


def test_an_ingress_loads_nothing(far: Far) -> None:
    async def scenario(desk: Desk) -> list[str]:
        await _drawn(desk, order())
        return desk.pipeline.pool.loads

    assert far.run(scenario) == []


def test_a_handover_shares_nothing_with_its_job(far: Far) -> None:
    pipeline: Pipeline = far.base
    job = pipeline.start(SMALL)
    list(pipeline.encode([job]))
    from sdxl_trt.server.ray.errands import Handover

    handover = Handover.of(job)
    before = handover.latents.copy()
    job.latents += 1.0
    job.noises["refiner"].draw(job.latents.shape[1:])
    assert np.array_equal(handover.latents, before)
    one, other = pipeline.start(SMALL), pipeline.start(SMALL)
    handover.give(one)
    one.noises["refiner"].draw(one.latents.shape[1:])
    handover.give(other)
    assert one.noises["base"] is one.noises["refiner"]
    assert not np.array_equal(other.noises["refiner"].draw(other.latents.shape[1:]),
                              one.noises["refiner"].draw(one.latents.shape[1:]))  # fmt: skip
