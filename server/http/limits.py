"""How large a body may be, how long it may take, and how fast a websocket may talk."""

__all__ = ["BODY_SECONDS", "check_declared", "limit_body", "limit_messages"]

import asyncio
import time
from collections import deque
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Send

from sdxl_trt.server.http.errors import ApiError

BODY_SECONDS, SLOWEST, GRACE = 30.0, 1024, 5.0
"""The seconds for a whole body, the fewest bytes a second, and the seconds before that counts."""
MESSAGES, SECOND = 10, 1.0
POLICY = 1008
"""The websocket's close code for a client that does what it must not."""
Clock = Callable[[], float]


class _Body:
    """How much of a body came, and how long the rest may take."""

    def __init__(self, max_body: int, clock: Clock) -> None:
        self._max, self._clock, self._started, self._bytes = max_body, clock, clock(), 0
        self.whole = False

    def left(self) -> float:
        """Return the seconds within which more must come; not positive if the client is too slow."""
        allowed = min(BODY_SECONDS, GRACE + self._bytes / SLOWEST)
        return allowed - (self._clock() - self._started)

    def add(self, message: Message) -> None:
        """Count what came; raises ApiError (413) beyond the limit."""
        self._bytes += len(message.get("body", b""))
        self.whole = message["type"] != "http.request" or not message.get("more_body", False)
        if self._bytes > self._max:
            raise too_large(self._max)


def too_large(max_body: int) -> ApiError:
    """Return the refusal of a body of more than `max_body` bytes."""
    return ApiError(413, f"the body is longer than {max_body} bytes; send less", "body_too_large")


def check_declared(headers: Headers, max_body: int) -> None:
    """Refuse (413) a body that is declared to be too large, before any of it is read."""
    declared = headers.get("content-length", "0")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > max_body):
        raise too_large(max_body)


def limit_body(receive: Receive, max_body: int, clock: Clock = time.monotonic) -> Receive:
    """Return `receive` with the limits of a body: it raises ApiError, 413 for its size and 408 for its slowness.

    Once the body is whole, waiting for the client to leave has no limit.
    """
    body = _Body(max_body, clock)

    async def limited() -> Message:
        if body.whole:
            return await receive()
        try:
            async with asyncio.timeout(max(body.left(), 0.0)):
                message = await receive()
        except TimeoutError:
            raise too_slow() from None
        body.add(message)
        if not body.whole and body.left() <= 0:
            raise too_slow()
        return message

    return limited


def too_slow() -> ApiError:
    """Return the refusal of a body that comes too slowly."""
    message = f"the body came too slowly; send it within {BODY_SECONDS:g} s, and at least {SLOWEST} bytes a second"
    return ApiError(408, message, "too_slow")


def limit_messages(receive: Receive, send: Send, clock: Clock = time.monotonic) -> Receive:
    """Return a websocket's `receive`, which closes it (1008) for more than ten messages within a second."""
    times: deque[float] = deque(maxlen=MESSAGES)

    async def limited() -> Message:
        message = await receive()
        if message["type"] != "websocket.receive":
            return message
        now = clock()
        if len(times) == MESSAGES and now - times[0] < SECOND:
            await send({"type": "websocket.close", "code": POLICY, "reason": "too many messages"})
            return {"type": "websocket.disconnect", "code": POLICY}
        times.append(now)
        return message

    return limited
