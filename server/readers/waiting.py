"""Waiting for an order: how long a client waits, and whether it is still there."""

__all__ = ["deadline_of", "ended_or_left", "gone"]

import asyncio
import contextlib
import math
from collections.abc import Mapping

from starlette.requests import Request as HttpRequest

from sdxl_trt.server.desk import Drawn, Ended
from sdxl_trt.server.options import Options
from sdxl_trt.server.readers.once import Reader

_LEAVES = "x-stainless-read-timeout"
"""OpenAI's clients say when they leave, to come again: where an order outlives its client, this is no deadline."""


def deadline_of(headers: Mapping[str, str], options: Options) -> float:
    """Return the seconds within which a request must be answered; headers only shorten the server's own deadline."""
    names = ["x-request-timeout-seconds"]
    if options.on_disconnect in (None, "cancel"):
        names.append(_LEAVES)
    told = [seconds for name in names if (seconds := _seconds(headers.get(name, ""))) is not None]
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


async def ended_or_left(request: HttpRequest, reader: Reader) -> tuple[Ended, list[Drawn]]:
    """Return how an order ended, and its pictures in order; if the client leaves before, so does its reader."""
    left = asyncio.create_task(gone(request))
    left.add_done_callback(lambda task: None if task.cancelled() else reader.leave())
    try:
        pictures = [event async for event in reader.ticket.events() if isinstance(event, Drawn)]
        ended = await reader.ticket.wait()
    except asyncio.CancelledError:
        reader.leave()
        raise
    finally:
        left.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await left
    return ended, sorted(pictures, key=lambda drawn: drawn.index)
