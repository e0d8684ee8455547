"""The events of a stream: partial images, then each picture completed; an error is the last one."""

__all__ = ["KEEP_ALIVE", "Partials", "Streamed", "stream"]

import asyncio
import base64
import contextlib
import json
import math
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request as HttpRequest

from sdxl_trt.engines.bundle import Manifest
from sdxl_trt.server.desk import Drawn, Ended, Event, Stepped, Waiting
from sdxl_trt.server.openai.answers import Answered, Link, Usage, error_body, facts
from sdxl_trt.server.openai.body import Asked
from sdxl_trt.server.openai.faults import as_api_error, check_ended
from sdxl_trt.server.openai.pictures import encode, estimate_picture
from sdxl_trt.server.options import Options
from sdxl_trt.server.readers import Reader, gone

KEEP_ALIVE = 15.0
"""Seconds of silence after which a comment is sent, so that no proxy takes the connection for dead."""


@dataclass(frozen=True, eq=False)
class Streamed:
    """A request whose events are sent: `steps` are those of one picture, `kind` is image_generation or image_edit."""

    asked: Asked
    kind: str
    steps: int
    usage: Usage
    warnings: tuple[str, ...]
    manifest: Manifest
    link: Link
    options: Options


@dataclass(frozen=True, eq=False)
class Partial:
    """An estimate to be shown: number `index` of a picture, after `step` of its steps in `stage`."""

    image: int
    index: int
    step: int
    stage: str
    latents: NDArray[np.float32]


class Partials:
    """Chooses which estimates are shown, at most `wanted` of each of `count` pictures, evenly over its `steps`."""

    def __init__(self, count: int, wanted: int, steps: int) -> None:
        shares = (math.ceil((number + 1) * steps / (wanted + 1)) for number in range(wanted))
        self._at = [step for step in dict.fromkeys(shares) if step < steps]
        self._done = [0] * count

    def of(self, event: Stepped) -> list[Partial]:
        """Return those that an event brings: it is one step of the pictures whose estimates it has."""
        if event.estimate is None or event.stage not in ("base", "refiner"):
            return []
        chosen = []
        for image, latents in enumerate(event.estimate, start=event.first):
            self._done[image] += 1
            if (step := self._done[image]) in self._at:
                chosen.append(Partial(image, self._at.index(step), step, event.stage, latents))
        return chosen


class _Turns:
    """Holds back what belongs to a later picture: events are sent picture after picture."""

    def __init__(self) -> None:
        self._now = 0
        self._held: dict[int, deque[Partial | Drawn]] = {}

    def take(self, item: Partial | Drawn) -> list[Partial | Drawn]:
        """Return what is to be sent now that `item` is there, in order."""
        number = item.index if isinstance(item, Drawn) else item.image
        self._held.setdefault(number, deque()).append(item)
        ready: list[Partial | Drawn] = []
        while waiting := self._held.get(self._now):
            ready.append(waiting.popleft())
            if isinstance(ready[-1], Drawn):
                self._held.pop(self._now)
                self._now += 1
        return ready


async def stream(request: HttpRequest, reader: Reader, streamed: Streamed) -> AsyncIterator[bytes]:
    """Yield the events of an order, and comments between them; the last event is a completed picture or an error.

    With the client, its reader leaves.
    """
    try:
        async for text in _told(request, reader, streamed):
            yield text
    finally:
        reader.leave()


async def _told(request: HttpRequest, reader: Reader, streamed: Streamed) -> AsyncIterator[bytes]:
    partials = Partials(streamed.asked.n, streamed.asked.partial_images, streamed.steps)
    turns, drawn = _Turns(), 0
    try:
        async for event in _with_pauses(request, reader):
            if isinstance(event, Ended):
                check_ended(event, streamed.options, drawn=drawn)
                continue
            if comment := _comment(event):
                yield comment
            items = partials.of(event) if isinstance(event, Stepped) else [event] if isinstance(event, Drawn) else []
            for item in (ready for each in items for ready in turns.take(each)):
                yield await asyncio.to_thread(_event, item, streamed)
                drawn += isinstance(item, Drawn)
    except Exception as exc:  # noqa: BLE001 - the answer has begun: its last event says what happened
        yield _encoded("error", error_body(as_api_error(exc, streamed.options)))


async def _with_pauses(request: HttpRequest, reader: Reader) -> AsyncIterator[Event | None]:
    """Yield the events of an order, and None for each long silence; the reader leaves with its client."""
    events = reader.ticket.events()
    left, following = asyncio.create_task(gone(request)), asyncio.create_task(_next(events))
    try:
        while True:
            waited = {following} if left.done() else {left, following}
            done, _ = await asyncio.wait(waited, timeout=KEEP_ALIVE, return_when=asyncio.FIRST_COMPLETED)
            if left in done:
                reader.leave()
            if following in done:
                yield (event := following.result())
                if isinstance(event, Ended):
                    return
                following = asyncio.create_task(_next(events))
            elif not done:
                yield None
    finally:
        for task in (left, following):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration):
                await task


async def _next(events: AsyncIterator[Event]) -> Event:
    return await anext(events)


def _event(item: Partial | Drawn, streamed: Streamed) -> bytes:
    """Return one event; encoding a picture takes long enough to be done beside the event loop."""
    name, data = _completed(item, streamed) if isinstance(item, Drawn) else _partial(item, streamed)
    kind = f"{streamed.kind}.{name}"
    return _encoded(kind, {"type": kind, "created_at": int(time.time()), **data})


def _partial(item: Partial, streamed: Streamed) -> tuple[str, dict[str, Any]]:
    asked, factor = streamed.asked, streamed.manifest.base.vae.factor
    file = estimate_picture(item.latents, streamed.manifest, asked.output)
    height, width = (side * factor for side in item.latents.shape[1:])
    return "partial_image", {
        "b64_json": base64.b64encode(file).decode(),
        "partial_image_index": item.index,
        **facts(asked, (width, height)),
        "image_index": item.image,
        "step": item.step,
        "steps": streamed.steps,
        "stage": item.stage,
    }


def _completed(item: Drawn, streamed: Streamed) -> tuple[str, dict[str, Any]]:
    drawn = answered(item, streamed.asked)
    return "completed", {
        "b64_json": base64.b64encode(drawn.file).decode(),
        **({"url": streamed.link(drawn.file)} if streamed.asked.as_url else {}),
        **facts(streamed.asked, drawn.size),
        "usage": streamed.usage.as_json(),
        "image_index": item.index,
        "seed": drawn.seed,
        "warnings": list(streamed.warnings),
    }


def answered(item: Drawn, asked: Asked) -> Answered:
    """Return a finished picture as an answer has it."""
    return Answered(encode(item.picture, asked.output), item.picture.seed, item.picture.image.size)


def _comment(event: Event | None) -> bytes:
    """Return a comment, which clients skip: where the order is, for our own page, or that the server is alive."""
    if isinstance(event, Waiting):
        return f": waiting {json.dumps({'place': event.place, 'seconds': round(event.seconds, 1)})}\n\n".encode()
    if isinstance(event, Stepped):
        told = {"stage": event.stage, "index": event.index, "total": event.total}
        return f": step {json.dumps(told)}\n\n".encode()
    return b": keep-alive\n\n" if event is None else b""


def _encoded(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()
