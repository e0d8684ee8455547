"""Draw once what is asked twice: a repeated request reads the order of the first one, in work or finished.

A request is repeated if it has the same `Idempotency-Key`, or if an SDK says that it retries (x-stainless-retry-count)
a body that is in work or was finished a moment ago. Orders that failed or were stopped are not read again.
"""

__all__ = ["Asking", "Once", "Reader"]

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sdxl_trt.server.desk import Ticket
from sdxl_trt.server.http import ApiError
from sdxl_trt.server.options import Options

KEPT_BY_KEY, KEPT_BY_BODY = 24 * 3600.0, 60.0
"""Seconds for which a finished order can be read again, with a key and without one."""
MOST_FINISHED, MOST_BYTES = 64, 128 << 20
"""Finished orders that can be read again, and the bytes of their pictures."""
MOST_KEY = 255
Submit = Callable[[], Awaitable[Ticket]]


@dataclass(frozen=True)
class Asking:
    """Who asks what: `digest` is that of the body, `key` the Idempotency-Key, "" without one."""

    who: str
    path: str
    digest: str
    key: str = ""
    retries: bool = False

    @property
    def may_repeat(self) -> bool:
        """Return whether it may ask for an order that was placed before, for which a full queue has no meaning."""
        return bool(self.key) or self.retries

    @classmethod
    def of(
        cls, who: str, path: str, headers: Mapping[str, str], body: Mapping[str, Any], files: Iterable[bytes] = ()
    ) -> "Asking":
        """Return what a request with these headers, fields and files asks. Raises ApiError (400) for a long key."""
        key = headers.get("idempotency-key", "")
        if len(key.encode()) > MOST_KEY:
            raise ApiError(400, f"Idempotency-Key: give at most {MOST_KEY} bytes", "invalid_value")
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode())
        for file in files:
            digest.update(hashlib.sha256(file).digest())
        count = headers.get("x-stainless-retry-count", "")
        return cls(who, path, digest.hexdigest(), key, count.isascii() and count.isdigit() and int(count) > 0)


@dataclass(eq=False)
class _Order:
    """An order that may be read again: the task that submits it, and how many still read it."""

    digest: str
    task: asyncio.Task[Ticket]
    created: int
    by_key: bool
    readers: int = 0
    finished: float | None = field(default=None)

    @property
    def may_be_read(self) -> bool:
        """Return whether it is in work, or ended with pictures."""
        if not self.task.done():
            return True
        if self.task.cancelled() or self.task.exception() is not None:
            return False
        ticket = self.task.result()
        return ticket.stop is None and (ticket.ended is None or ticket.ended.outcome == "done")


class Reader:
    """One client's part in an order; `created` is when the order came, in seconds since 1970."""

    def __init__(
        self, ticket: Ticket, order: _Order, options: Options, on_leave: Callable[[], None], *, replayed: bool
    ) -> None:
        self.ticket, self.created, self.replayed = ticket, order.created, replayed
        self._order, self._options, self._on_leave, self._left = order, options, on_leave, False

    def leave(self) -> None:
        """Read no more: the last reader stops an order that has not ended, as `--on-disconnect` says."""
        if self._left:
            return
        self._left = True
        self._order.readers -= 1
        policy = self._options.on_disconnect or "cancel"
        stops = policy == "cancel" or (policy == "finish-if-started" and self.ticket.started is None)
        if stops and not self._order.readers and self.ticket.ended is None:
            self.ticket.cancel()
        self._on_leave()


class Once:
    """The orders of one API that may be read again. It belongs to one event loop."""

    def __init__(self, options: Options, clock: Callable[[], float] = time.monotonic) -> None:
        self._options, self._clock = options, clock
        self._orders: dict[tuple[str, ...], _Order] = {}

    async def read(self, asking: Asking, submit: Submit) -> Reader:
        """Return a reader of the order that `submit` places, or of that of an equal request before.

        Raises ApiError (422) for a key that another body had, and whatever `submit` raises.
        """
        self._forget()
        name = (asking.who, asking.path, *(("key", asking.key) if asking.key else ("body", asking.digest)))
        order = self._orders.get(name)
        known = order is not None and order.may_be_read and asking.may_repeat
        if order is not None and known and order.digest != asking.digest:
            raise ApiError(422, "Idempotency-Key: was used for another request; give each request a key of its own",
                           "invalid_value")  # fmt: skip
        if order is None or not known:
            task = asyncio.ensure_future(submit())
            order = self._orders[name] = _Order(asking.digest, task, int(time.time()), bool(asking.key))
        order.readers += 1
        try:
            ticket = await asyncio.shield(order.task)
        except BaseException:
            order.readers -= 1
            if order.task.done() and self._orders.get(name) is order:
                del self._orders[name]
            raise
        return Reader(ticket, order, self._options, self._forget, replayed=known)

    def _forget(self) -> None:
        """Forget orders that ended badly, or too long ago, and the oldest beyond MOST_FINISHED or MOST_BYTES.

        It is called when a reader comes or leaves, so that the last orders of a burst do not stay.
        """
        now, finished = self._clock(), list[tuple[tuple[str, ...], _Order]]()
        for name, order in [*self._orders.items()]:
            if (
                order.finished is None
                and order.task.done()
                and (not order.may_be_read or order.task.result().ended is not None)
            ):
                order.finished = now
            if order.finished is None:
                continue
            kept = KEPT_BY_KEY if order.by_key else KEPT_BY_BODY
            if not order.may_be_read or now - order.finished > kept:
                del self._orders[name]
            else:
                finished.append((name, order))
        finished.sort(key=lambda each: each[1].finished or 0.0)
        left = MOST_BYTES
        for number, (name, order) in enumerate(reversed(finished)):
            left -= order.task.result().size
            if number >= MOST_FINISHED or left < 0:
                del self._orders[name]
