"""The worker of an ingress: it draws nothing, and sends every picture to the pools, base first, then refiner."""

__all__ = ["FarRoom", "Pools"]

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np

from sdxl_trt.engines import EngineError
from sdxl_trt.server.desk import Drawn, Ended, Event, Graph, Order, Outcome, Piece, Room, Shift, Stepped, Ticket
from sdxl_trt.server.desk.plan import Predictor, Task
from sdxl_trt.server.ray.dispatch import Dispatch
from sdxl_trt.server.ray.errands import Errand, Handover, Over, Part
from sdxl_trt.server.ray.outlet import Lost, Outlet

TRIES = 2
"""How often a picture is begun whose device is lost; then its order fails."""
ASK_AGAIN = 1.0
log = logging.getLogger("sdxl_trt.server")


@dataclass
class Pools:
    """Where pictures are drawn: one pool for everything, or one for each expert. `ready` returns when they can draw."""

    base: Outlet
    refiner: Outlet | None
    ready: Callable[[], Awaitable[None]]


class FarRoom(Room):
    """A room whose thread runs an event loop, on which every picture is a task that follows it through the pools.

    `make` makes the pools on that loop.
    """

    def __init__(
        self,
        shift: Shift,
        predictor: Predictor,
        on_end: Callable[[Ticket, Ended], None],
        on_change: Callable[[], None],
        make: Callable[[], Pools],
    ) -> None:
        self._make = make
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stirred: asyncio.Event | None = None
        self._journeys: dict[Piece, _Journey] = {}
        super().__init__(shift, predictor, on_end, on_change)

    # ---------------------------------------------------------------- what the desk calls

    def add(self, pieces: list[Piece]) -> None:  # type: ignore[override]
        """Let the pieces of an order wait; called under the lock."""
        super().add(pieces)
        self.wake()

    def withdraw(self, ticket: Ticket) -> bool:
        """Forget an order that has not begun; return whether it had not."""
        withdrawn = super().withdraw(ticket)
        self.wake()
        return withdrawn

    def wake(self) -> None:
        """Let the loop look at what has changed."""
        super().wake()
        loop, stirred = self._loop, self._stirred
        if loop is not None and stirred is not None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(stirred.set)

    def close(self, timeout: float) -> bool:
        """Cancel what the pools draw; return whether the thread ended within `timeout` seconds."""
        self._closing = True
        self.wake()
        return super().close(timeout)

    # ---------------------------------------------------------------- the loop

    def _serve(self) -> None:
        asyncio.run(self._work())

    async def _work(self) -> None:
        self._loop, self._stirred = asyncio.get_running_loop(), asyncio.Event()
        for journey in [*self._journeys.values()]:  # those of a loop that died
            self.arrived(journey.piece, EngineError("the worker died while it was drawn"))
        pools = self._make()
        for outlet in (pools.base, pools.refiner):
            if outlet is not None:
                outlet.on_change(self._stirred.set)
        opening = asyncio.create_task(self._open(pools))
        try:
            while not self._closing:
                self._stirred.clear()
                self._look(pools)
                await self._stirred.wait()
        finally:
            tasks = [opening, *(journey.task for journey in self._journeys.values() if journey.task is not None)]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _open(self, pools: Pools) -> None:
        """Wait until the pools can draw, and say so."""
        while True:
            try:
                await pools.ready()
            except Exception as exc:  # noqa: BLE001 - they are asked again
                log.warning("the pools are not ready: %s", type(exc).__name__)
                await asyncio.sleep(ASK_AGAIN)
            else:
                break
        self.fault = ""
        self.shifts[0].opened.set_result(None)
        self._on_change()

    def _look(self, pools: Pools) -> None:
        """Send what can be sent, and stop what nobody waits for."""
        for journey in [*self._journeys.values()]:
            journey.look()
        with self.lock:
            shift = self.shifts[0]
            dispatch = shift.scheduler
            assert isinstance(dispatch, Dispatch)  # noqa: S101 - an ingress has no other
            while (task := dispatch.take(lambda task: self._may(pools, task))) is not None:
                journey = _Journey(self, pools, dispatch, shift.pieces[task], _first(pools, task))
                self._journeys[journey.piece] = journey
                journey.task = asyncio.create_task(journey.go())
                journey.task.add_done_callback(journey.arrive)

    def _may(self, pools: Pools, task: Task) -> bool:
        """Return whether a task can be sent now: its first pool takes it, and few wait between the two."""
        first = _first(pools, task)
        if not first.open or self._at(first) >= first.most:
            return False
        between = pools.refiner if first is pools.base and task.refiner_key is not None else None
        return between is None or self._at(between) < 2 * between.most

    def _at(self, outlet: Outlet) -> int:
        return sum(journey.at is outlet for journey in self._journeys.values())

    # ---------------------------------------------------------------- what journeys call

    def begin(self, piece: Piece) -> None:
        """State that a pool has begun with a piece."""
        with self.lock:
            self.ledger.begin([piece])
        self._on_change()

    def arrived(self, piece: Piece, error: Exception | None) -> None:
        """State that nothing more is done for a piece."""
        self._journeys.pop(piece, None)
        if error is None:
            self._close(piece)
            return
        self._fail(piece, error)
        for journey in self._journeys.values():
            if journey.piece.ticket is piece.ticket:
                journey.stop()

    def spent(self, piece: Piece, over: Over) -> None:
        """Take in what a pool needed for a piece."""
        self.pulse = time.monotonic()
        for stage, seconds in over.ended.seconds.items():
            if stage != "queue":
                self.ledger.spend([piece], stage, seconds)
                for listener in self.on_stage:
                    listener(stage, seconds)
        if piece.work is not None:
            for stage, seconds in over.seconds.items():
                self._predictor.observe(stage, piece.work.pixels, seconds)


@dataclass(eq=False)
class _Journey:
    """One piece on its way through the pools."""

    room: FarRoom
    pools: Pools
    dispatch: Dispatch
    piece: Piece
    at: Outlet
    task: asyncio.Task[None] | None = None
    error: Exception | None = None
    """What ended it."""
    begun: bool = False
    stopping: bool = False
    _errands: int = field(default=0)

    def look(self) -> None:
        """Stop it if nobody waits for it any more; one that is only to be decoded is not stopped for an interrupt."""
        piece = self.piece
        interrupted = piece.ticket.stop == "interrupted" and piece.ticket.ended is None
        if piece.stopped and not (interrupted and piece.complete):
            self.stop()

    def stop(self) -> None:
        """Cancel what a pool does for it."""
        if self.task is not None and not self.stopping:
            self.stopping = True
            self.task.cancel()

    def arrive(self, _: object) -> None:
        """Tell the room that it has ended."""
        self.room.arrived(self.piece, self.error)

    async def go(self) -> None:
        """Go all the way, or as far as somebody waits for it."""
        try:
            try:
                await self._draw()
            except asyncio.CancelledError:
                await self._interrupted()
        except Exception as exc:  # noqa: BLE001 - it ends the order
            log.warning("a picture failed: %s", type(exc).__name__)
            self.error = exc

    async def _draw(self) -> None:
        task, pools = self.piece.task, self.pools
        if task.base_key is None or task.refiner_key is None or pools.refiner is None:
            await self._do(_first(pools, task), "all")
            return
        handover = await self._do(pools.base, "base")
        assert handover is not None  # noqa: S101 - the base has ended well
        self.dispatch.move(task, "handed_over")
        self.at = pools.refiner
        await self._do(pools.refiner, "refiner", handover=handover)

    async def _interrupted(self) -> None:
        """Have the estimate decoded that is there, if the piece was interrupted, and not cancelled."""
        piece = self.piece
        wanted = piece.ticket.stop == "interrupted" and piece.ticket.ended is None and piece.request is not None
        if wanted and piece.estimate is not None:
            piece.early = True
            refined = piece.task.refiner_key is not None and self.pools.refiner is not None
            outlet = self.pools.refiner if refined and self.pools.refiner is not None else self.pools.base
            await self._do(outlet, "decode")

    async def _do(self, outlet: Outlet, part: Part, handover: Handover | None = None) -> Handover | None:
        """Have a part done, once more if its device is lost; return what the base left. Raises what ended it."""
        for attempt in range(TRIES):
            self._errands += 1
            errand = _errand(self.piece, part, handover, self._errands)
            try:
                return await self._once(outlet, errand)
            except Lost as exc:
                log.warning("a device was lost while it drew: %s", exc)
                if attempt + 1 == TRIES:
                    raise EngineError("the device that drew it was lost, and then another one") from exc
        raise AssertionError

    async def _once(self, outlet: Outlet, errand: Errand) -> Handover | None:
        async with aclosing(outlet.do(errand)) as answers:
            async for event in answers:
                if isinstance(event, Over):
                    return self._over(event)
                self._heard(event, errand)
        raise Lost("its answer ended early")

    def _over(self, over: Over) -> Handover | None:
        self.room.spent(self.piece, over)
        outcome: Outcome = over.ended.outcome
        if outcome == "failed":
            raise over.ended.error or EngineError("the device said no reason")
        if outcome != "done":
            raise Lost(f"the device {outcome} it")
        return over.handover

    def _heard(self, event: Event, errand: Errand) -> None:
        """Tell the order's readers what a pool told of this piece."""
        piece = self.piece
        if isinstance(event, Stepped):
            if not self.begun:
                self.begun = True
                self.room.begin(piece)
            if errand.part == "refiner":
                self.dispatch.move(piece.task, "refiner")
            self._stepped(event, errand)
        elif isinstance(event, Drawn):
            piece.ticket.tell(replace(event, index=piece.first + event.index))

    def _stepped(self, event: Stepped, errand: Errand) -> None:
        piece = self.piece
        if event.estimate is not None and piece.request is not None and len(event.estimate) == piece.task.pictures:
            piece.estimate = np.array(event.estimate)
        last = "refiner" if errand.part == "refiner" else "base" if piece.task.refiner_key is None else "refiner"
        piece.complete |= event.stage in (last, "decode") and event.index == event.total
        shown = event.estimate if piece.ticket.order.wants_estimates else None
        piece.ticket.tell(replace(event, first=piece.first + event.first, estimate=shown))


def _first(pools: Pools, task: Task) -> Outlet:
    """Return the pool that a task needs first: the base's, unless it has only the refiner's steps."""
    alone = pools.refiner is not None and task.base_key is None and not task.alone
    return pools.refiner if alone and pools.refiner is not None else pools.base


def _errand(piece: Piece, part: Part, handover: Handover | None, number: int) -> Errand:
    """Return an errand of its own id: a device that is lost may still work on the one before."""
    order: Order = piece.ticket.order
    work = order.work if piece.request is None else piece.request
    known = {each.name: getattr(order, each.name) for each in fields(Order)}
    # Whoever interrupts wants what is estimated by then; a pool sends events on, and need not keep them.
    estimates = order.wants_estimates or order.api == "a1111"
    changed = {"work": work, "id": f"{order.id}/{piece.first}/{number}", "deadline": None,
               "wants_estimates": estimates, "keeps_estimates": True}  # fmt: skip
    estimate = piece.estimate if part == "decode" else None
    return Errand(**known | changed, part=part, handover=handover, estimate=estimate, files=_files(work))


def _files(work: object) -> dict[str, bytes]:
    """Return the contents of a graph's pictures: the devices do not see this machine's files."""
    pictures = getattr(work, "pictures", {}) if isinstance(work, Graph) else {}
    return {name: Path(path).read_bytes() for name, path in pictures.items()}
