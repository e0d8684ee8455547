"""An order at the desk: what has become of it, for any number of readers on the event loop."""

__all__ = ["Ticket"]

import asyncio
import time
from bisect import bisect
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from sdxl_trt.runtime import Picture
from sdxl_trt.server.desk.orders import Drawn, Ended, Event, Order, Stepped, Waiting


class Ticket:
    """What the desk gives for an order. All of it belongs to the event loop on which it was made.

    `tell` and `begin` may be called by the worker's thread; everything else only on the loop. `seconds` and
    `last_estimate` are the worker's.
    """

    def __init__(self, order: Order) -> None:
        self.order = order
        self.created = time.monotonic()
        self.started: float | None = None
        self.pictures: list[Picture] = []
        """Those that are finished, in the order of their indices."""
        self.place: Waiting | None = None
        self.progress: Stepped | None = None
        """The latest step; `estimate` is kept until another step has one."""
        self.ended: Ended | None = None
        self.stop: str | None = None
        """"cancelled" or "interrupted" once somebody stops it: the worker looks between two calls of a UNet."""
        self.warnings: tuple[str, ...] = ()
        """What the runtime says of the request before anything is drawn; it may hold a piece of the prompt."""
        self.on_stop: Callable[[], None] = _nothing
        """What the desk does when somebody stops it."""
        self.listeners: list[Callable[[Event], None]] = []
        """Called on the loop with every event, after the ticket has taken it."""
        self.loop = asyncio.get_running_loop()
        self.readers = 0
        """How many readers have begun with the events and not come to the end."""
        self._indices: list[int] = []
        self._events: list[Event] = []
        self._news = asyncio.Event()

    @property
    def size(self) -> int:
        """Return the bytes of the pictures that it holds: the order's, and the finished ones with their latents."""
        drawn = sum(
            len(each.image.getbands()) * each.image.width * each.image.height + each.latents.nbytes
            for each in self.pictures
        )
        return self.order.size + drawn

    def tell(self, event: Event) -> None:
        """Pass `event` to every reader; callable from any thread."""
        self.loop.call_soon_threadsafe(self.take, event)

    def begin(self) -> None:
        """State that the worker has begun with it; callable from any thread."""
        self.loop.call_soon_threadsafe(self._begin, time.monotonic())

    def _begin(self, now: float) -> None:
        self.started = self.started or now

    def take(self, event: Event) -> None:
        """Pass `event` to every reader now; what comes after `Ended` is lost."""
        if self.ended is not None:
            return
        if isinstance(event, Drawn):
            # Devices that draw at the same time may finish in another order.
            place = bisect(self._indices, event.index)
            self._indices.insert(place, event.index)
            self.pictures.insert(place, event.picture)
        elif isinstance(event, Waiting):
            self.place = event
        elif isinstance(event, Stepped):
            self._begin(time.monotonic())
            kept = self.progress.estimate if self.progress is not None and event.estimate is None else event.estimate
            self.progress = replace(event, estimate=kept)
            if not self.order.keeps_estimates:
                event = replace(event, estimate=None)
        else:
            self.ended = event
        if isinstance(event, Waiting) and not self.readers and self._events and isinstance(self._events[-1], Waiting):
            self._events.pop()  # whoever reads later wants the latest place alone
        self._events.append(event)
        self._forget_estimates()
        self._news.set()
        self._news = asyncio.Event()
        for listener in self.listeners:
            listener(event)
        if self.ended is not None:
            self._let_go()

    def _let_go(self) -> None:
        """Forget who listens: they refer to the ticket, and a circle with pictures would stay until it is collected.

        The collector counts objects, not bytes, so hundreds of pictures could wait for it.
        """
        self.on_stop = _nothing
        self.listeners = []

    def _forget_estimates(self) -> None:
        """Let go of the previews once nobody is about to read them: they hold most of an order's memory."""
        if self.ended is not None and not self.readers:
            self._events = [replace(e, estimate=None) if isinstance(e, Stepped) else e for e in self._events]

    def cancel(self) -> None:
        """Stop it between two calls of a UNet, and lose its pictures; do nothing if it has ended."""
        self._stop("cancelled")

    def interrupt(self) -> None:
        """Stop it between two calls of a UNet, and decode what is estimated by then."""
        self._stop("interrupted")

    def _stop(self, how: str) -> None:
        if self.stop is None and self.ended is None:
            self.stop = how
            self.on_stop()

    async def events(self) -> AsyncIterator[Event]:
        """Yield every event from the first to `Ended`; any number of readers may follow.

        A reader who begins after the end is told of the steps without their estimates.
        """
        read = 0
        self.readers += 1
        try:
            while not read or not isinstance(self._events[read - 1], Ended):
                if read == len(self._events):
                    await self._news.wait()
                else:
                    read += 1
                    yield self._events[read - 1]
        finally:
            self.readers -= 1
            self._forget_estimates()

    async def wait(self) -> Ended:
        """Return how it ended; `pictures` are complete then."""
        while self.ended is None:
            await self._news.wait()
        return self.ended


def _nothing() -> None:
    """Do nothing."""
