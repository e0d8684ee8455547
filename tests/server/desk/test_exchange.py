"""A pipeline that is exchanged for another while orders are drawn."""

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sdxl_trt.engines import EngineError
from sdxl_trt.runtime import Pipeline, Request
from sdxl_trt.server import Options
from sdxl_trt.server.desk import Desk, Ticket
from sdxl_trt.server.desk.studio import Studio

Serve = Callable[..., Any]


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
            desk = Desk(self.old, Options(), owned=True)
            assert await desk.warm()
            self.said.clear()
            try:
                return await asyncio.wait_for(scenario(desk), 60)
            finally:
                desk.close()

        return asyncio.run(main())


def test_running_orders_end_on_the_old_pipeline_and_new_ones_are_drawn_with_the_new_one(
    pipeline: Pipeline, calls: Any, freed: list[Studio], order: Any, pixels: Any
) -> None:
    both = _Exchange(pipeline)

    async def scenario(desk: Desk) -> tuple[Ticket, ...]:
        gate = calls.hold()
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
    np.testing.assert_array_equal(pixels(running.pictures), pixels(later.pictures))
    # The test picture, the order that waited since before, and the orders of the new one.
    order_of = [word for word, _ in itertools.groupby(both.said)]
    assert order_of == ["old draws", "new draws", "old draws", "old closed", "new draws", "new closed"]
    assert [studio.pipeline for studio in freed] == [both.old, both.new]


@pytest.mark.parametrize("fault", ["opening", "drawing"])
def test_a_pipeline_that_fails_leaves_the_one_before_in_service(
    pipeline: Pipeline, calls: Any, freed: list[Studio], fault: str, order: Any, small: Request, pixels: Any
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

    np.testing.assert_array_equal(pixels(both.run(scenario).pictures), pixels(pipeline.generate(small)))
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
