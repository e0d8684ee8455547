"""Orders that are drawn, stopped, late, refused or failing, on the embedded pair."""

import asyncio
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from sdxl_trt.engines import CorruptError, EngineError, ResourceError, UsageError
from sdxl_trt.runtime import Pipeline, Request
from sdxl_trt.server.desk import Desk, Drawn, Ended, Graph, Order, Stepped, Ticket, Waiting
from sdxl_trt.server.desk.plan import Times
from sdxl_trt.server.desk.studio import Studio
from sdxl_trt.server.refusals import Draining, NotReady, QueueFull, TooLate, TooMany


def _fixtures() -> ModuleType:
    name = "desk_conftest"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("conftest.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


kit = _fixtures()
SMALL: Request = kit.SMALL
order = kit.order
Serve = Callable[..., Any]


def _pixels(ticket: Ticket) -> list[np.ndarray]:
    return [np.asarray(picture.image) for picture in ticket.pictures]


def _alone(pipeline: Pipeline, request: Request) -> list[np.ndarray]:
    return [np.asarray(picture.image) for picture in pipeline.generate(request)]


def _psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = float(np.mean((one.astype(float) - other.astype(float)) ** 2))
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


async def _all(desk: Desk, *orders: Order) -> list[Ticket]:
    tickets = [await desk.submit(each) for each in orders]
    for ticket in tickets:
        await ticket.wait()
    return tickets


def test_an_order_is_told_from_its_place_to_its_picture(serve: Serve, pipeline: Pipeline, calls: Any) -> None:
    calls.real = True

    async def scenario(desk: Desk) -> tuple[list[Any], Ticket]:
        ticket = await desk.submit(order(wants_estimates=True))
        shown = [event async for event in ticket.events()]
        assert desk.tickets == {}
        return shown, ticket

    events, ticket = serve(scenario)
    assert isinstance(events[0], Waiting)
    assert events[0].place == 1
    steps = [(event.stage, event.index, event.total) for event in events if isinstance(event, Stepped)]
    assert [each for each in steps if each[0] in ("base", "refiner")] == [
        ("base", 1, 2), ("base", 2, 2), ("refiner", 1, 2), ("refiner", 2, 2)
    ]  # fmt: skip
    assert all(event.estimate is not None for event in events if isinstance(event, Stepped) and event.stage == "base")
    assert isinstance(events[-2], Stepped | Drawn)
    ended = events[-1]
    assert ended.outcome == "done"
    assert {"queue", "encode", "base", "refiner", "decode"} <= set(ended.seconds)
    np.testing.assert_array_equal(_pixels(ticket), _alone(pipeline, SMALL))


def test_a_later_reader_sees_the_same_events_without_estimates(serve: Serve) -> None:
    async def scenario(desk: Desk) -> list[Any]:
        (ticket,) = await _all(desk, order(wants_estimates=True))
        return [event async for event in ticket.events()]

    events = serve(scenario)
    assert isinstance(events[-1], Ended)
    assert not any(event.estimate is not None for event in events if isinstance(event, Stepped))


@pytest.mark.parametrize("fixed", [False, True])
def test_orders_that_share_calls_draw_what_each_draws_alone(serve: Serve, calls: Any, fixed: bool) -> None:
    orders = [order(seed=seed, prompt=f"a {word} star") for seed, word in enumerate(("red", "blue", "green", "white"))]

    calls.real = True

    async def scenario(desk: Desk) -> list[list[np.ndarray]]:
        alone = [(await _all(desk, replace(each, id=f"{each.id}-alone")))[0] for each in orders]
        calls.made.clear()
        gate = calls.before = kit.Gate()
        first = await desk.submit(order(seed=99))
        await gate.holds()
        tickets = [await desk.submit(each) for each in orders]
        calls.made.clear()
        gate.opened.set()
        for ticket in (first, *tickets):
            assert (await ticket.wait()).outcome == "done"
        return [[_pixels(ticket)[0] for ticket in group] for group in (alone, tickets)]

    alone, together = serve(scenario, fixed_batch=fixed)
    assert len(calls.made) <= 4 + 4
    assert {8} == {rows for _, rows in calls.made if fixed or rows > 2}
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one, other) if fixed else _psnr(one, other) >= 50
    assert not np.array_equal(together[0], together[1])


def test_an_order_of_several_pictures_draws_them_in_their_places(serve: Serve, pipeline: Pipeline, calls: Any) -> None:
    async def scenario(desk: Desk) -> dict[int, np.ndarray]:
        (ticket,) = await _all(desk, order(count=3, refiner_seed=11))
        events = [event async for event in ticket.events() if isinstance(event, Drawn)]
        return {event.index: np.asarray(event.picture.image) for event in events}

    drawn = serve(scenario)
    expected = _alone(pipeline, replace(SMALL, count=3, refiner_seed=11))
    assert sorted(drawn) == [0, 1, 2]
    assert all(_psnr(drawn[index], expected[index]) >= 50 for index in range(3))


def test_pictures_of_one_comfyui_batch_keep_their_common_noise(serve: Serve, pipeline: Pipeline, calls: Any) -> None:
    request = replace(SMALL, compat="comfyui", count=2, sampler="euler_ancestral")

    async def scenario(desk: Desk) -> list[np.ndarray]:
        return _pixels((await _all(desk, order(request)))[0])

    assert all(_psnr(*pair) >= 50 for pair in zip(serve(scenario), _alone(pipeline, request), strict=True))


@pytest.mark.parametrize("expert", ["unet", "refiner_unet"])
def test_one_of_four_is_cancelled_and_the_others_are_unchanged(serve: Serve, calls: Any, expert: str) -> None:
    async def scenario(desk: Desk) -> None:
        orders = [order(seed=seed) for seed in range(4)]
        alone = [_pixels((await _all(desk, replace(each, id=f"{each.id}-alone")))[0])[0] for each in orders]
        gate, held = kit.Gate(), kit.Gate()
        calls.before = gate
        first = await desk.submit(order(seed=99))
        await gate.holds()
        tickets = [await desk.submit(each) for each in orders]
        calls.before = lambda name, rows: held(name, rows) if name == expert and rows > 2 else None
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
            np.testing.assert_array_equal(_pixels(tickets[number])[0], alone[number])

    serve(scenario, fixed_batch=False)


def test_a_waiting_order_is_cancelled_at_once(serve: Serve, calls: Any) -> None:
    async def scenario(desk: Desk) -> None:
        gate = calls.before = kit.Gate()
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


def test_an_interrupted_order_shows_its_latest_estimate(serve: Serve, calls: Any, pipeline: Pipeline) -> None:
    async def scenario(desk: Desk) -> Ticket:
        gate = kit.Gate()
        calls.before = lambda name, rows: gate(name, rows) if name == "refiner_unet" else None
        ticket = await desk.submit(order(wants_estimates=True))
        await gate.holds()
        ticket.interrupt()
        gate.opened.set()
        assert (await ticket.wait()).outcome == "interrupted"
        return ticket

    ticket = serve(scenario)
    (shown,) = _pixels(ticket)
    estimate = next(step.denoised for step in pipeline.steps(SMALL) if step.stage == "refiner")
    job = pipeline.start(SMALL)
    assert estimate is not None
    job.latents = estimate.copy()
    (expected,) = [np.asarray(step.picture.image) for step in pipeline.decode(job) if step.picture is not None]
    np.testing.assert_array_equal(shown, expected)
    assert not np.array_equal(shown, _alone(pipeline, SMALL)[0])


def test_an_order_interrupted_before_its_first_step_has_no_picture(serve: Serve, calls: Any) -> None:
    async def scenario(desk: Desk) -> None:
        gate = calls.before = kit.Gate()
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


def test_an_order_ends_at_its_deadline_though_the_engine_hangs(serve: Serve, calls: Any) -> None:
    async def scenario(desk: Desk) -> None:
        gate = calls.before = kit.Gate()
        late = await desk.submit(order(deadline=600.0))
        await gate.holds()
        desk._expire(late)
        assert (await late.wait()).outcome == "deadline"
        assert not desk.ready
        assert "not returned" in desk.ready.reason
        gate.opened.set()
        (next_one,) = await _all(desk, order())
        assert next_one.ended is not None
        assert next_one.ended.outcome == "done"
        assert desk.ready

    serve(scenario)


def test_an_order_ends_at_its_deadline_in_the_queue(serve: Serve, calls: Any) -> None:
    async def scenario(desk: Desk) -> None:
        gate = calls.before = kit.Gate()
        running = await desk.submit(order())
        await gate.holds()
        desk._fits = lambda pieces, now: True  # type: ignore[method-assign]
        late = await desk.submit(order(deadline=0.01))
        assert (await late.wait()).outcome == "deadline"
        assert desk.waiting() == 0
        gate.opened.set()
        assert (await running.wait()).outcome == "done"

    serve(scenario)


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
    serve: Serve, calls: Any, pipeline: Pipeline, freed: list[Any], error: Any
) -> None:
    async def scenario(desk: Desk) -> list[np.ndarray]:
        calls.before = _failing(error)
        (failed,) = await _all(desk, order())
        assert failed.ended is not None
        assert failed.ended.outcome == "failed"
        assert failed.ended.error is not None
        if isinstance(error, Exception):
            assert failed.ended.error is error
        assert len(freed) == (0 if isinstance(error, Exception) else 1)
        (fine,) = await _all(desk, order())
        assert desk.ready
        return _pixels(fine)

    np.testing.assert_array_equal(serve(scenario), _alone(pipeline, SMALL))


@pytest.mark.parametrize("error", [ResourceError("out of memory"), SystemExit(3)])
def test_orders_that_fail_in_company_are_drawn_alone(
    serve: Serve, calls: Any, pipeline: Pipeline, error: BaseException
) -> None:
    async def scenario(desk: Desk) -> list[Ticket]:
        gate = calls.before = kit.Gate()
        first = await desk.submit(order(seed=99))
        await gate.holds()
        tickets = [await desk.submit(order(seed=seed)) for seed in range(3)]
        calls.before = _failing(error, times=1000, rows=3)
        gate.opened.set()
        await first.wait()
        assert [(await ticket.wait()).outcome for ticket in tickets] == ["done"] * 3
        return tickets

    for seed, ticket in enumerate(serve(scenario)):
        np.testing.assert_array_equal(_pixels(ticket), _alone(pipeline, replace(SMALL, seed=seed)))


def test_the_server_is_not_ready_while_its_engines_fail(serve: Serve, calls: Any) -> None:
    async def scenario(desk: Desk) -> None:
        checked = asyncio.Event()
        desk.on_change.append(lambda: None if desk.ready else checked.set())
        calls.before = _failing(ResourceError("out of memory"), times=1000)
        (failed,) = await _all(desk, order())
        assert failed.ended is not None
        assert failed.ended.outcome == "failed"
        await checked.wait()
        assert "test failed" in desk.ready.reason
        with pytest.raises(NotReady):
            await desk.submit(order())

    serve(scenario)


def test_what_cannot_be_drawn_is_refused_before_it_waits(serve: Serve, calls: Any) -> None:
    async def scenario(desk: Desk) -> None:
        with pytest.raises(UsageError, match="multiples"):
            await desk.submit(order(width=65))
        with pytest.raises(UsageError, match="graphs"):
            await desk.submit(Order(Graph({}, Path()), "comfyui", "a", "g"))
        with pytest.raises(UsageError, match="pictures"):
            await desk.submit(order(count=129))
        assert desk.tickets == {}
        assert calls.made == []

    serve(scenario)


def test_a_full_queue_refuses_but_keeps_a_place_for_others(serve: Serve, calls: Any) -> None:
    async def scenario(desk: Desk) -> None:
        gate = calls.before = kit.Gate()
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


def test_of_a_thousand_orders_at_once_as_many_are_taken_as_the_queue_holds(serve: Serve, calls: Any) -> None:
    async def scenario(desk: Desk) -> None:
        gate = calls.before = kit.Gate()
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


def test_only_requests_that_may_be_taken_are_translated(serve: Serve, calls: Any) -> None:
    async def scenario(desk: Desk) -> None:
        gate = calls.before = kit.Gate()
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


def test_too_many_pictures_are_refused_though_few_orders_wait(serve: Serve, calls: Any) -> None:
    async def scenario(desk: Desk) -> None:
        gate = calls.before = kit.Gate()
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


def test_what_would_end_after_its_deadline_is_refused(serve: Serve) -> None:
    async def scenario(desk: Desk) -> None:
        desk.predictor.observe("base", 64 * 64, 1000.0)
        with pytest.raises(TooLate) as refused:
            await desk.submit(order(deadline=5.0))
        assert refused.value.retry_after == 120
        assert desk.tickets == {}

    serve(scenario)


def test_a_key_beyond_its_rate_is_refused(serve: Serve) -> None:
    async def scenario(desk: Desk) -> None:
        await _all(desk, order(who="a"))
        with pytest.raises(TooMany):
            await desk.submit(order(who="a"))
        await _all(desk, order(who="b"))

    serve(scenario, rate_requests=1)


def test_places_move_up(serve: Serve, calls: Any) -> None:
    async def scenario(desk: Desk) -> list[int]:
        gate = calls.before = kit.Gate()
        running = await desk.submit(order())
        await gate.holds()
        first = await desk.submit(order())
        second = await desk.submit(order())
        first.cancel()
        gate.opened.set()
        for ticket in (running, second):
            await ticket.wait()
        return [event.place async for event in second.events() if isinstance(event, Waiting)]

    assert serve(scenario) == [2, 1]


def test_a_graph_is_run_by_its_runner_alone(serve: Serve) -> None:
    def runner(pipeline: Pipeline, graph: Graph, ticket: Ticket) -> Iterator[Any]:
        for step in pipeline.steps(graph.nodes["request"]):
            if step.picture is not None:
                yield Drawn(0, step.picture, node="9")

    async def scenario(desk: Desk) -> None:
        desk.runner = runner
        tickets = await _all(desk, Order(Graph({"request": SMALL}, Path()), "comfyui", "a", "g"), order(who="b"))
        assert [ticket.ended.outcome for ticket in tickets if ticket.ended] == ["done", "done"]
        np.testing.assert_array_equal(_pixels(tickets[0]), _pixels(tickets[1]))

    serve(scenario)


def test_draining_refuses_what_waits_and_finishes_what_runs(serve: Serve, calls: Any) -> None:
    async def scenario(desk: Desk) -> None:
        gate = calls.before = kit.Gate()
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


class _Pool:
    """The engines of another pool; it says when they are used and closed."""

    def __init__(self, name: str, pool: Any, said: list[str]) -> None:
        self._name, self._pool, self._said = name, pool, said

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def phase(self, *uses: Any, **more: Any) -> Any:
        self._said.append(f"{self._name} draws")
        return self._pool.phase(*uses, **more)

    def close(self) -> None:
        self._said.append(f"{self._name} closed")


class _Exchange:
    """A desk whose pipeline "old" can be exchanged for "new"; `said` is what the pools of both were asked for."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.said: list[str] = []
        self.old, self.new = (
            Pipeline(_Pool(name, pipeline.pool, self.said))
            for name in ("old", "new")  # type: ignore[arg-type]
        )

    def run(self, scenario: Any) -> Any:
        async def main() -> Any:
            desk = Desk(self.old, kit.Options(), owned=True)
            assert await desk.warm()
            self.said.clear()
            try:
                return await asyncio.wait_for(scenario(desk), 60)
            finally:
                desk.close()

        return asyncio.run(main())


def test_running_orders_end_on_the_old_pipeline_and_new_ones_are_drawn_with_the_new_one(
    pipeline: Pipeline, calls: Any, freed: list[Studio]
) -> None:
    both = _Exchange(pipeline)

    async def scenario(desk: Desk) -> tuple[Ticket, ...]:
        gate = calls.before = kit.Gate()
        running = await desk.submit(order())
        await gate.holds()
        swapping = asyncio.ensure_future(desk.swap_pipeline(lambda: both.new))
        waiting = await desk.submit(order(seed=6))
        assert desk.pipeline is both.old
        gate.opened.set()
        await swapping
        assert desk.pipeline is both.new
        assert running.ended is not None
        later = await desk.submit(order())
        for ticket in (running, waiting, later):
            assert (await ticket.wait()).outcome == "done"
        assert desk.ready
        return running, later

    running, later = both.run(scenario)
    np.testing.assert_array_equal(_pixels(running), _pixels(later))
    # The test picture, the order that waited since before, and the orders of the new one.
    order_of = [word for word, _ in itertools.groupby(both.said)]
    assert order_of == ["old draws", "new draws", "old draws", "old closed", "new draws", "new closed"]
    assert [studio.pipeline for studio in freed] == [both.old, both.new]


@pytest.mark.parametrize("fault", ["opening", "drawing"])
def test_a_pipeline_that_fails_leaves_the_one_before_in_service(
    pipeline: Pipeline, calls: Any, freed: list[Studio], fault: str
) -> None:
    both = _Exchange(pipeline)

    def fails(*_: Any, **__: Any) -> Any:
        raise EngineError("no such engine")

    async def scenario(desk: Desk) -> Ticket:
        both.new.pool.phase = fails  # type: ignore[method-assign]
        with pytest.raises(EngineError, match="no such engine"):
            await desk.swap_pipeline(fails if fault == "opening" else lambda: both.new)
        assert desk.pipeline is both.old
        ticket = await desk.submit(order())
        assert (await ticket.wait()).outcome == "done"
        assert desk.ready
        return ticket

    np.testing.assert_array_equal(_pixels(both.run(scenario)), _alone(pipeline, SMALL))
    assert both.said.count("new closed") == (fault == "drawing")
    assert both.said[-1] == "old closed"


def test_a_bundle_that_was_exported_in_its_own_place_is_not_unloaded_before_the_new_one_has_drawn(
    pipeline: Pipeline, calls: Any, freed: list[Studio], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Studio, "is_stored", lambda self: False)
    both = _Exchange(pipeline)

    async def scenario(desk: Desk) -> None:
        await desk.swap_pipeline(lambda: both.new)

    both.run(scenario)
    assert freed == []


def test_a_cycle_runs_all_base_phases_before_one_change_of_experts(
    serve: Serve, calls: Any, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Studio, "times", lambda self: Times(swap=1.0))

    async def scenario(desk: Desk) -> list[Ticket]:
        gate = calls.before = kit.Gate()
        first = await desk.submit(order(seed=99, handoff=None))
        await gate.holds()
        tickets = [await desk.submit(order(seed=seed, steps=4 + seed % 2)) for seed in range(4)]
        calls.made.clear()
        gate.opened.set()
        for ticket in (first, *tickets):
            await ticket.wait()
        return tickets

    tickets = serve(scenario)
    experts = [name for name, _ in calls.made]
    assert experts == sorted(experts, key=["unet", "refiner_unet"].index)
    assert {"unet", "refiner_unet"} == set(experts)
    for seed, ticket in enumerate(tickets):
        assert _psnr(_pixels(ticket)[0], _alone(pipeline, replace(SMALL, seed=seed, steps=4 + seed % 2))[0]) >= 50
