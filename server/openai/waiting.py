"""Waiting for an order: how long a client waits, and what becomes of the order if it leaves."""

__all__ = ["deadline_of", "ended_or_left", "gone", "leave"]

import asyncio
import contextlib
import math
from collections.abc import Mapping

from starlette.requests import Request as HttpRequest

from sdxl_trt.server.desk import Drawn, Ended, Ticket
from sdxl_trt.server.options import Options

_TOLD = ("x-request-timeout-seconds", "x-stainless-read-timeout")
"""Headers in which clients say how long they wait; they only shorten the server's own deadline."""


def deadline_of(headers: Mapping[str, str], options: Options) -> float:
    """Return the seconds within which a request must be answered."""
    told = [seconds for name in _TOLD if (seconds := _seconds(headers.get(name, ""))) is not None]
    return min([options.deadline, *told])


def _seconds(text: str) -> float | None:
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds > 0 else None


async def gone(request: HttpRequest) -> None:
    """Return when the client has left; its body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def leave(ticket: Ticket, options: Options) -> None:
    """Stop the order of a client that has left, unless `--on-disconnect` lets it finish."""
    policy = options.on_disconnect or "cancel"
    if policy == "cancel" or (policy == "finish-if-started" and ticket.started is None):
        ticket.cancel()


async def ended_or_left(request: HttpRequest, ticket: Ticket, options: Options) -> tuple[Ended, list[Drawn]]:
    """Return how an order ended, and its pictures in order; if the client leaves, it is stopped as `leave` says."""
    left = asyncio.create_task(gone(request))
    left.add_done_callback(lambda task: None if task.cancelled() else leave(ticket, options))
    try:
        pictures = [event async for event in ticket.events() if isinstance(event, Drawn)]
        ended = await ticket.wait()
    except asyncio.CancelledError:
        leave(ticket, options)
        raise
    finally:
        left.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await left
    return ended, sorted(pictures, key=lambda drawn: drawn.index)
