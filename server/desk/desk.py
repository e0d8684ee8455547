"""The desk: takes orders, refuses those that cannot be served, and tells what becomes of the others."""

__all__ = ["Desk", "Readiness"]

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sdxl_trt.engines import UsageError
from sdxl_trt.runtime import Pipeline, Request
from sdxl_trt.runtime.request import ResolvedRequest
from sdxl_trt.server.desk.files import Files
from sdxl_trt.server.desk.orders import Ended, Order, Waiting
from sdxl_trt.server.desk.pieces import Piece, pieces_of, work_of
from sdxl_trt.server.desk.plan import Policy, Predictor, Scheduler, Task
from sdxl_trt.server.desk.rates import Rates
from sdxl_trt.server.desk.room import Room, Runner
from sdxl_trt.server.desk.shift import Shift
from sdxl_trt.server.desk.studio import Studio
from sdxl_trt.server.desk.ticket import Ticket
from sdxl_trt.server.options import Options
from sdxl_trt.server.refusals import Draining, NotReady, QueueFull, RefusedError, TooLate

WAIT = 60.0
"""W, the most seconds that a cycle lasts."""
HUNG = 300.0
"""Seconds after which an engine call that has not returned counts as hung."""
PATIENCE = 5.0
"""Seconds for which a worker is waited for that was told to stop."""


@dataclass(frozen=True)
class Readiness:
    """Whether new orders would be drawn, and if not, why not."""

    ready: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ready


class Desk:
    """Takes orders and has them drawn. Made and used on one event loop.

    Listeners of `on_change` are called on the loop whenever an order comes, starts or ends; those of `on_order` in the
    task that submits an order, before its first event, with what its request was resolved to; those of `on_refused`
    with the reason why an order is not taken. `runner` runs graphs. With `owned`, the desk closes `pipeline`.
    """

    def __init__(self, pipeline: Pipeline, options: Options, *, owned: bool = False) -> None:
        self.options = options
        self.on_change: list[Callable[[], None]] = []
        self.on_order: list[Callable[[Ticket, ResolvedRequest | None], None]] = []
        self.on_refused: list[Callable[[RefusedError], None]] = []
        self.tickets: dict[str, Ticket] = {}
        """The orders that are alive, by id, in the order in which they came."""
        self.draining = False
        self.files = Files()
        self.rates = Rates(options.rate_requests, options.rate_seconds)
        self.predictor = Predictor()
        self._loop = asyncio.get_running_loop()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._hung_at: float | None = None
        self._translated: Counter[str] = Counter()
        self._room = self._make_room(pipeline, owned=owned)

    def _make_room(self, pipeline: Pipeline, *, owned: bool) -> Room:
        return Room(self._shift(pipeline, owned=owned), self.predictor, self._on_end, self._on_news)

    def _shift(self, pipeline: Pipeline, *, owned: bool) -> Shift:
        studio = Studio(pipeline, self.predictor, fixed=self.options.fixed_batch)
        return Shift(studio, Scheduler(Policy(wait=WAIT, pictures=studio.pictures)), owned=owned)

    @property
    def pipeline(self) -> Pipeline:
        """Return the pipeline that draws the orders that come now."""
        return self._room.shifts[-1].studio.pipeline

    @property
    def runner(self) -> Runner | None:
        """What runs graphs; orders with one are refused as long as it is None."""
        return self._room.runner

    @runner.setter
    def runner(self, runner: Runner) -> None:
        self._room.runner = runner

    @property
    def on_stage(self) -> list[Callable[[str, float], None]]:
        """Listeners for metrics, on the worker's thread: what each stage of a piece of work took; see `Room`."""
        return self._room.on_stage

    @property
    def on_call(self) -> list[Callable[[str, int, int], None]]:
        """Listeners for metrics, on the worker's thread: the rows of each common call of a UNet; see `Room`."""
        return self._room.on_call

    # ---------------------------------------------------------------- orders

    async def submit(self, order: Order) -> Ticket:
        """Check `order` and queue it. Raises RefusedError if it is not taken, SdxlTrtError if it cannot be drawn."""
        with self._refusals_told():
            return await self._submitted(order)

    @contextmanager
    def _refusals_told(self) -> Iterator[None]:
        try:
            yield
        except RefusedError as exc:
            for listener in self.on_refused:
                listener(exc)
            raise

    async def _submitted(self, order: Order) -> Ticket:
        self._check_open(order.who)
        resolved = None
        if isinstance(order.work, Request):
            resolved = await self._resolved(order.work)
        elif self.runner is None:
            raise UsageError("graphs are not served here; send a request of another API")
        seconds = self._predicted(resolved)
        self._check_open(order.who, len(resolved.seeds) if resolved else 1)
        self.rates.take(order.who, seconds)
        try:
            return self._queue(order, resolved)
        except BaseException:
            self.rates.give_back(order.who, seconds)
            raise

    @contextmanager
    def place(self, who: str) -> Iterator[None]:
        """Hold a place in the queue while a request of `who` is translated into an order. Raises RefusedError.

        Of a thousand requests that come at once, only those that may be taken are translated.
        """
        soon_in_work = self._room.shifts[-1].studio.pictures
        translated = max(self._translated.total() - soon_in_work, 0)
        with self._refusals_told():
            self._check_open(who, translated=translated, own=self._translated[who])
        self._translated[who] += 1
        try:
            yield
        finally:
            self._translated[who] -= 1
            self._translated += Counter()  # forgets those who have none

    async def _resolved(self, request: Request) -> ResolvedRequest:
        """Return `request` with the defaults of the pipeline that will draw it."""
        while True:
            pipeline = self.pipeline
            resolved = await asyncio.to_thread(pipeline.resolve, request)
            if pipeline is self.pipeline:
                return resolved

    def _check_open(self, who: str, pictures: int = 1, *, translated: int = 0, own: int = 0) -> None:
        """Raise RefusedError if no order of `who` is taken, or none of so many `pictures`.

        `translated` requests hold places, `own` of them are of `who`.
        """
        if self.draining:
            raise Draining("the server is stopping; ask another one", 30)
        if self._room.fault and self._room.shifts[-1].opened.done():
            raise NotReady(f"{self._room.fault}; try again later", 30)
        if pictures > self.options.queue_pictures:
            raise UsageError(f"{pictures} pictures in one request; ask for {self.options.queue_pictures} at most")
        orders, waiting = self.waiting() + translated, self.counts()["waiting"] + translated
        # Somebody who has nothing here gets a place even if others have filled the queue.
        share = 1 if own or any(ticket.order.who == who for ticket in self.tickets.values()) else 2
        if orders >= share * self.options.queue or waiting + pictures > share * self.options.queue_pictures:
            raise QueueFull(f"{orders} requests wait already; try again later", math.ceil(self.drain_seconds()))

    def _predicted(self, resolved: ResolvedRequest | None) -> float:
        if resolved is None:
            return self.predictor.graph().total
        return self.predictor.cost(work_of(resolved, len(resolved.seeds))).total

    def _queue(self, order: Order, resolved: ResolvedRequest | None) -> Ticket:
        if order.id in self.tickets:
            raise UsageError(f"id {order.id}: an order with this id is still in work; give another id")
        ticket = Ticket(order)
        allowed = min(order.deadline or math.inf, self.options.deadline or math.inf)
        pieces = self._pieces(ticket, resolved, ticket.created + allowed)
        with self._room.lock:
            needed = self._drain() + sum(piece.task.seconds for piece in pieces)
            if not self._fits(pieces, ticket.created):
                raise TooLate(
                    f"it would take about {needed:.0f} s, longer than its deadline of {allowed:g} s; try again later",
                    math.ceil(needed - allowed),
                )
            for listener in self.on_order:
                listener(ticket, resolved)
            self._room.add(pieces)
            self.tickets[order.id] = ticket
            self._tell_places()  # before the worker can begin
        ticket.on_stop = lambda: self._stopped(ticket)
        if math.isfinite(allowed):
            self._timers[order.id] = self._loop.call_later(allowed, self._expire, ticket)
        self._changed()
        return ticket

    def _pieces(self, ticket: Ticket, resolved: ResolvedRequest | None, deadline: float) -> list[Piece]:
        if resolved is not None:
            return pieces_of(ticket, resolved, self.predictor, deadline)
        task = Task(ticket.order.who, self.predictor.graph(), ticket.created, None, None, deadline, alone=True)
        return [Piece(ticket, task)]

    def _fits(self, pieces: list[Piece], now: float) -> bool:
        """Return whether the pieces end before their deadline, behind those whose turn comes first."""
        if not math.isfinite(pieces[0].task.deadline):
            return True
        tasks = {piece.task for piece in pieces}
        foreseen = self._room.shifts[-1].scheduler.foreseen(self._room.times, tasks)
        before = sum(shift.scheduler.drain(self._room.times) for shift in self._room.shifts[:-1])
        last = max(seconds for task, seconds in foreseen if task in tasks)
        return now + before + last <= pieces[0].task.deadline

    def _stopped(self, ticket: Ticket) -> None:
        """Let go of an order at once if nobody has begun with it, else let the worker look."""
        if self._room.withdraw(ticket):
            self._ended(ticket, Ended("interrupted" if ticket.stop == "interrupted" else "cancelled"))
        else:
            self._room.wake()

    def _expire(self, ticket: Ticket) -> None:
        """End an order at its deadline, whatever the worker does."""
        begun = not self._room.withdraw(ticket)
        self._ended(ticket, Ended("deadline", seconds=self._room.ledger.seconds(ticket)))
        if begun:
            self._hung_at = self._room.pulse
            self._room.wake()

    # ---------------------------------------------------------------- what the worker tells

    def _on_end(self, ticket: Ticket, ended: Ended) -> None:
        self._call(self._ended, ticket, ended)

    def _on_news(self) -> None:
        self._call(self._changed)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def _ended(self, ticket: Ticket, ended: Ended) -> None:
        if ticket.ended is None and not ended.seconds:
            ended = Ended(ended.outcome, ended.error, {"queue": time.monotonic() - ticket.created})
        ticket.take(ended)
        if timer := self._timers.pop(ticket.order.id, None):
            timer.cancel()
        if self.tickets.get(ticket.order.id) is ticket:
            del self.tickets[ticket.order.id]
        self._changed()

    def _changed(self) -> None:
        self._tell_places()
        for listener in self.on_change:
            listener()

    def _tell_places(self) -> None:
        """Tell those who wait their places, if they moved."""
        seconds = 0.0
        with self._room.lock:
            foreseen: dict[Ticket, float] = {}
            for shift in self._room.shifts:
                for task, until in shift.scheduler.foreseen(self._room.times):
                    foreseen[shift.pieces[task].ticket] = seconds + until
                seconds += shift.scheduler.drain(self._room.times)
            waiting = [ticket for ticket in foreseen if not self._room.ledger.has_begun(ticket)]
        for place, ticket in enumerate(waiting, start=1):
            if ticket.place is None or ticket.place.place != place:
                ticket.take(Waiting(place, foreseen[ticket]))

    # ---------------------------------------------------------------- figures

    def waiting(self) -> int:
        """Return how many orders wait for the worker."""
        with self._room.lock:
            return sum(not self._room.ledger.has_begun(ticket) for ticket in self.tickets.values())

    def counts(self) -> dict[str, int]:
        """Return how many pictures are where: waiting, base, handed_over, refiner."""
        with self._room.lock:
            each = [shift.scheduler.counts() for shift in self._room.shifts]
        return {place: sum(counts[place] for counts in each) for place in each[0]}

    def oldest_wait(self) -> float:
        """Return the seconds for which the oldest order waits that the worker has not begun with; 0.0 without one."""
        with self._room.lock:
            waiting = [t.created for t in self.tickets.values() if not self._room.ledger.has_begun(t)]
        return time.monotonic() - min(waiting) if waiting else 0.0

    def drain_seconds(self) -> float:
        """Return the predicted seconds until everything that was taken is drawn."""
        with self._room.lock:
            return self._drain()

    def _drain(self) -> float:
        return sum(shift.scheduler.drain(self._room.times) for shift in self._room.shifts)

    @property
    def ready(self) -> Readiness:
        """Return whether new orders would be drawn: warm engines, a place in the queue, and not stopping."""
        room = self._room
        if self.draining:
            return Readiness(False, "the server is stopping")
        if room.fault:
            return Readiness(False, room.fault)
        silent = time.monotonic() - room.pulse if room.busy else 0.0
        if silent > HUNG or (room.busy and self._hung_at == room.pulse):
            return Readiness(False, f"a call of an engine has not returned for {silent:.0f} s")
        if self.waiting() >= self.options.queue:
            return Readiness(False, "the queue is full")
        return Readiness(True)

    # ---------------------------------------------------------------- another pipeline, and the end

    async def swap_pipeline(self, open_pipeline: Callable[[], Pipeline]) -> None:
        """Draw new orders with another pipeline; those that were taken end on the one before, which is closed then.

        Between two cycles, the worker unloads the engines in service, calls `open_pipeline`, and draws a test picture.
        Returns when it is drawn; the desk closes that pipeline in the end. Raises what `open_pipeline` or the picture
        raises: everything then stays as it was.
        """
        done = self._room.exchange(lambda: self._shift(open_pipeline(), owned=True))
        await asyncio.shield(asyncio.wrap_future(done))

    async def warm(self) -> Readiness:
        """Wait until the test picture of the latest pipeline was drawn or has failed; return `ready`."""
        await asyncio.wrap_future(self._room.shifts[-1].opened)
        return self.ready

    async def drain(self, grace: float) -> bool:
        """Take no more orders, refuse those that wait, and give the others `grace` seconds; say whether all ended."""
        self.draining = True
        for ticket in [*self.tickets.values()]:
            if self._room.withdraw(ticket):
                self._ended(ticket, Ended("failed", Draining("the server is stopping; ask another one", 30)))
        left = [asyncio.ensure_future(ticket.wait()) for ticket in self.tickets.values()]
        for seconds in (grace, PATIENCE):
            if left:
                _, waiting = await asyncio.wait(left, timeout=seconds)
                left = [*waiting]
            for ticket in [*self.tickets.values()]:
                ticket.cancel()
        for task in left:
            task.cancel()
        return not left

    def close(self) -> None:
        """Take no more orders, end the one that is drawn at its next step, and join the worker.

        A worker whose engine does not return is left behind after a few seconds.
        """
        self.draining = True
        for ticket in [*self.tickets.values()]:
            ticket.cancel()
        ended = self._room.close(PATIENCE)
        for ticket in [*self.tickets.values()]:
            self._ended(ticket, Ended("cancelled"))
        for shift in self._room.shifts:
            if ended and shift.owned:
                shift.studio.close()
