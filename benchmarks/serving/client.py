"""A bounded load of requests on loopback: bursts, closed loops, and open loops with random arrivals.

The client is a few lines on asyncio's streams, since it shares the processor with the server that it measures.
"""

__all__ = ["Answer", "Ask", "burst", "closed_loop", "open_loop", "post"]

import asyncio
import json
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

GIVE_UP = 900.0
"""Seconds after which an answer counts as lost."""
Ask = Callable[[int], Mapping[str, Any]]
"""Returns the JSON body of the request of a number."""


class Answer(msgspec.Struct, frozen=True):
    """What came back for request `number`: `status` 0 if nothing did. `started` and `seconds` are of this process."""

    number: int
    status: int
    started: float
    seconds: float
    retry_after: str = ""
    body: bytes = b""


async def post(port: int, path: str, body: Mapping[str, Any], number: int = 0) -> Answer:
    """Send one request on a connection of its own, and return the whole answer."""
    started = time.perf_counter()
    try:
        async with asyncio.timeout(GIVE_UP):
            status, headers, data = await _exchange(port, path, json.dumps(body).encode())
    except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError):
        return Answer(number, 0, started, time.perf_counter() - started)
    return Answer(number, status, started, time.perf_counter() - started, headers.get("retry-after", ""), data)


async def _exchange(port: int, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        status = int((await reader.readline()).split(b" ", 2)[1])
        headers = {}
        while (line := (await reader.readline()).decode("latin-1").strip()) != "":
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        return status, headers, await reader.readexactly(int(headers["content-length"]))
    except IndexError as exc:
        raise ValueError("the connection was closed before an answer") from exc
    finally:
        writer.close()


async def burst(port: int, path: str, ask: Ask, count: int) -> list[Answer]:
    """Send `count` requests at once; return the answers in the order of the requests."""
    return list(await asyncio.gather(*(post(port, path, ask(number), number) for number in range(count))))


async def closed_loop(port: int, path: str, ask: Ask, *, clients: int, seconds: float, first: int = 0) -> list[Answer]:
    """Have `clients` ask again and again for `seconds`; return all answers. Numbers begin with `first`."""
    until, number, answers = time.perf_counter() + seconds, first, list[Answer]()

    async def client() -> None:
        nonlocal number
        while time.perf_counter() < until:
            mine, number = number, number + 1
            answers.append(await post(port, path, ask(mine), mine))

    await asyncio.gather(*(client() for _ in range(clients)))
    return answers


async def open_loop(port: int, path: str, ask: Ask, *, rate: float, seconds: float, seed: int = 0) -> list[Answer]:
    """Send requests at random times, `rate` a second on average, whatever becomes of them; return all answers."""
    drawn = random.Random(seed)  # noqa: S311 - arrivals, the same in every run
    tasks, now, number = list[asyncio.Task[Answer]](), 0.0, 0
    began = time.perf_counter()
    while (now := now + drawn.expovariate(rate)) < seconds:
        await asyncio.sleep(max(0.0, began + now - time.perf_counter()))
        tasks.append(asyncio.create_task(post(port, path, ask(number), number)))
        number += 1
    return list(await asyncio.gather(*tasks))
