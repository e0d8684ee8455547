"""A pool as its ingress sees it: where errands are sent, and how many at a time."""

__all__ = ["Lost", "Outlet", "Send"]

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol

from sdxl_trt.server.desk import Event
from sdxl_trt.server.ray.errands import Errand, Over, Refused

AGAIN_SECONDS = 1.0
"""After how long a pool that took no more is asked again, if nothing has ended meanwhile."""
log = logging.getLogger("sdxl_trt.server")


class Answer(Protocol):
    """A stream of what a pool answers; `cancel` stops what it does."""

    def __aiter__(self) -> AsyncIterator[Any]: ...

    def cancel(self) -> object: ...


Send = Callable[[Errand], Answer]


class Lost(Exception):  # noqa: N818 - a reason to try again, not a fault of the errand
    """The device that worked on an errand is gone."""


class Outlet:
    """A pool's errands: at most `most` at a time, and fewer while the pool takes no more.

    `send` begins an errand on one of the pool's devices; it raises `full` when their queues are full.
    """

    def __init__(self, send: Send, most: int, full: type[Exception]) -> None:
        self._send, self.most, self._full = send, most, full
        self._going = 0
        self._blocked = False
        self._changed: Callable[[], None] = lambda: None
        self._news = asyncio.Event()

    def on_change(self, changed: Callable[[], None]) -> None:
        """Have `changed` called, on the event loop, whenever an errand could be sent again."""
        self._changed = changed

    @property
    def open(self) -> bool:
        """Return whether another errand can be sent now."""
        return self._going < self.most and not self._blocked

    async def do(self, errand: Errand) -> AsyncGenerator[Event | Over, None]:
        """Send an errand as soon as there is room; yield what is answered, `Over` last. Raises Lost.

        Leaving it before its end cancels the errand.
        """
        while True:
            async with self._place():
                answer, ended_early = self._send(errand), False
                try:
                    async for event in answer:
                        if isinstance(event, Refused):
                            log.warning("a pool takes no work: %s", event.reason)
                            break
                        yield event
                        if isinstance(event, Over):
                            return
                    else:
                        ended_early = True
                except self._full:
                    pass
                except Exception as exc:
                    raise Lost(type(exc).__name__) from exc
                finally:
                    answer.cancel()
            if ended_early:
                raise Lost("its answer ended early")
            self._block()

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        while not self.open:
            await self._news.wait()
        self._going += 1
        try:
            yield
        finally:
            self._going -= 1
            self._free()

    def _block(self) -> None:
        """Send nothing more until an errand has ended, or for a while."""
        self._blocked = True
        asyncio.get_running_loop().call_later(AGAIN_SECONDS, self._free)

    def _free(self) -> None:
        self._blocked = False
        self._news.set()
        self._news = asyncio.Event()
        self._changed()
