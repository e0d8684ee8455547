"""Orders that are drawn, alone and together, on the embedded pair."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdxl_trt.engines import UsageError
from sdxl_trt.runtime import Pipeline, Request
from sdxl_trt.server.desk import Desk, Drawn, Ended, Graph, Order, Stepped, Ticket, Waiting
from sdxl_trt.server.desk.plan import Times
from sdxl_trt.server.desk.studio import Studio

Serve = Callable[..., Any]


def _psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = float(np.mean((one.astype(float) - other.astype(float)) ** 2))
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def test_an_order_is_told_from_its_place_to_its_picture(
    serve: Serve, pipeline: Pipeline, calls: Any, order: Any, small: Request, pixels: Any
) -> None:
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
    np.testing.assert_array_equal(pixels(ticket.pictures), pixels(pipeline.generate(small)))


def test_a_later_reader_sees_the_same_events_without_estimates(serve: Serve, order: Any, draw: Any) -> None:
    async def scenario(desk: Desk) -> list[Any]:
        (ticket,) = await draw(desk, order(wants_estimates=True))
        return [event async for event in ticket.events()]

    events = serve(scenario)
    assert isinstance(events[-1], Ended)
    assert not any(event.estimate is not None for event in events if isinstance(event, Stepped))


@pytest.mark.parametrize("fixed", [False, True])
def test_orders_that_share_calls_draw_what_each_draws_alone(
    serve: Serve, calls: Any, fixed: bool, order: Any, draw: Any, pixels: Any
) -> None:
    orders = [order(seed=seed, prompt=f"a {word} star") for seed, word in enumerate(("red", "blue", "green", "white"))]

    calls.real = True

    async def scenario(desk: Desk) -> list[list[np.ndarray]]:
        alone = [(await draw(desk, replace(each, id=f"{each.id}-alone")))[0] for each in orders]
        calls.made.clear()
        gate = calls.hold()
        first = await desk.submit(order(seed=99))
        await gate.holds()
        tickets = [await desk.submit(each) for each in orders]
        calls.made.clear()
        gate.opened.set()
        for ticket in (first, *tickets):
            assert (await ticket.wait()).outcome == "done"
        return [[pixels(ticket.pictures)[0] for ticket in group] for group in (alone, tickets)]

    alone, together = serve(scenario, fixed_batch=fixed)
    assert len(calls.made) <= 4 + 4
    assert {8} == {rows for _, rows in calls.made if fixed or rows > 2}
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one, other) if fixed else _psnr(one, other) >= 50
    assert not np.array_equal(together[0], together[1])


def test_an_order_of_several_pictures_draws_them_in_their_places(
    serve: Serve, pipeline: Pipeline, calls: Any, order: Any, small: Request, draw: Any, pixels: Any
) -> None:
    async def scenario(desk: Desk) -> dict[int, np.ndarray]:
        (ticket,) = await draw(desk, order(count=3, refiner_seed=11))
        events = [event async for event in ticket.events() if isinstance(event, Drawn)]
        return {event.index: np.asarray(event.picture.image) for event in events}

    drawn = serve(scenario)
    expected = pixels(pipeline.generate(replace(small, count=3, refiner_seed=11)))
    assert sorted(drawn) == [0, 1, 2]
    assert all(_psnr(drawn[index], expected[index]) >= 50 for index in range(3))


def test_pictures_of_one_comfyui_batch_keep_their_common_noise(
    serve: Serve, pipeline: Pipeline, calls: Any, order: Any, small: Request, draw: Any, pixels: Any
) -> None:
    request = replace(small, compat="comfyui", count=2, sampler="euler_ancestral")

    async def scenario(desk: Desk) -> list[np.ndarray]:
        return pixels((await draw(desk, order(request)))[0].pictures)

    assert all(_psnr(*pair) >= 50 for pair in zip(serve(scenario), pixels(pipeline.generate(request)), strict=True))


def test_a_graph_is_run_by_its_runner_alone(serve: Serve, order: Any, small: Request, draw: Any, pixels: Any) -> None:
    def runner(pipeline: Pipeline, graph: Graph, ticket: Ticket) -> Iterator[Any]:
        for step in pipeline.steps(graph.nodes["request"]):
            if step.picture is not None:
                yield Drawn(0, step.picture, node="9")

    async def scenario(desk: Desk) -> None:
        desk.runner = runner
        tickets = await draw(desk, Order(Graph({"request": small}, Path()), "comfyui", "a", "g"), order(who="b"))
        assert [ticket.ended.outcome for ticket in tickets if ticket.ended] == ["done", "done"]
        np.testing.assert_array_equal(pixels(tickets[0].pictures), pixels(tickets[1].pictures))

    serve(scenario)


def test_a_cycle_runs_all_base_phases_before_one_change_of_experts(
    serve: Serve,
    calls: Any,
    pipeline: Pipeline,
    monkeypatch: pytest.MonkeyPatch,
    order: Any,
    small: Request,
    pixels: Any,
) -> None:
    monkeypatch.setattr(Studio, "times", lambda self: Times(swap=1.0))

    async def scenario(desk: Desk) -> list[Ticket]:
        gate = calls.hold()
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
        assert (
            _psnr(
                pixels(ticket.pictures)[0], pixels(pipeline.generate(replace(small, seed=seed, steps=4 + seed % 2)))[0]
            )
            >= 50
        )


def test_what_the_runtime_warns_of_is_told_to_the_client_and_not_logged(
    serve: Serve, caplog: pytest.LogCaptureFixture, order: Any
) -> None:
    words = "MARKER " * 100

    async def scenario(desk: Desk) -> None:
        ticket = await desk.submit(order(prompt=words))
        assert any("cut off" in line and "MARKER" in line for line in ticket.warnings)
        assert (await ticket.wait()).outcome == "done"
        with pytest.raises(UsageError, match="weight"):
            await desk.submit(order(prompt="(a star:1e9)", compat="comfyui"))

    serve(scenario)
    assert "MARKER" not in caplog.text


def test_what_cannot_be_drawn_is_refused_before_it_waits(serve: Serve, calls: Any, order: Any) -> None:
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
