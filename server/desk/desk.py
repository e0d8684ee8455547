"""The desk: a bounded queue in front of one worker thread that owns the pipeline."""

__all__ = ["Desk"]

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from sdxl_trt.engines import SdxlTrtError
from sdxl_trt.runtime import Batch, Pipeline, Request, Step
from sdxl_trt.runtime.request import resolve_request
from sdxl_trt.server.desk.orders import Draining, Drawn, Ended, Order, QueueFull, Stepped, Waiting
from sdxl_trt.server.desk.ticket import Ticket
from sdxl_trt.server.options import Options

log = logging.getLogger("sdxl_trt.server")


class Desk:
    """Takes orders and has them drawn, one after the other. Made and used on one event loop.

    Listeners of `on_change` are called on the loop whenever an order comes, starts or ends.
    """

    def __init__(self, pipeline: Pipeline, options: Options) -> None:
        self.pipeline, self.options = pipeline, options
        self.on_change: list[Callable[[], None]] = []
        self.tickets: dict[str, Ticket] = {}
        """The orders that are alive, by id, in the order in which they came."""
        self.draining = False
        self._work: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="draw", daemon=True)
        self._thread.start()

    async def submit(self, order: Order) -> Ticket:
        """Check `order` and queue it. Raises RefusedError if it is not taken, SdxlTrtError if it cannot be drawn."""
        if self.draining:
            raise Draining("the server is stopping; ask another one", 30)
        if self.waiting() >= self.options.queue:
            raise QueueFull(f"{self.options.queue} requests wait already; try again later", 5)
        if isinstance(order.work, Request):
            manifest, pool = self.pipeline.manifest, self.pipeline.pool
            await asyncio.to_thread(resolve_request, order.work, manifest, pool.limits, pool.bundle)
        ticket = Ticket(order)
        self.tickets[order.id] = ticket
        ticket.tell(Waiting(self.waiting(), 0.0))
        self._work.put(ticket)
        self._changed()
        return ticket

    def waiting(self) -> int:
        """Return how many orders wait for the worker."""
        return sum(ticket.started is None for ticket in self.tickets.values())

    def close(self) -> None:
        """Take no more orders, end the one that is drawn at its next step, and join the worker."""
        self.draining = True
        for ticket in self.tickets.values():
            ticket.cancel()
        self._work.put(None)
        self._thread.join()

    def _changed(self) -> None:
        for listener in self.on_change:
            listener()

    def _serve(self) -> None:
        while (ticket := self._work.get()) is not None:
            ended = self._drawn(ticket)
            ticket.tell(replace(ended, seconds={"queue": (ticket.started or time.monotonic()) - ticket.created}))
            ticket.loop.call_soon_threadsafe(self._forget, ticket)

    def _forget(self, ticket: Ticket) -> None:
        self.tickets.pop(ticket.order.id, None)
        self._changed()

    def _drawn(self, ticket: Ticket) -> Ended:
        try:
            assert isinstance(ticket.order.work, Request)  # noqa: S101 - graphs come later
            for _, step in self._steps(ticket.order.work):
                if ticket.stop is not None:
                    return Ended("cancelled")
                estimate = step.denoised.copy() if step.denoised is not None and ticket.order.wants_estimates else None
                ticket.tell(Stepped(step.stage, step.index, step.total, step.pictures.start, estimate))
                if step.picture is not None:
                    ticket.tell(Drawn(step.pictures.start, step.picture))
        except SdxlTrtError as exc:
            return Ended("failed", exc)
        except Exception as exc:
            log.exception("a request failed")
            return Ended("failed", exc)
        return Ended("done")

    def _steps(self, request: Request) -> Iterator[tuple[int, Step]]:
        return Batch(self.pipeline, [request]).steps()
