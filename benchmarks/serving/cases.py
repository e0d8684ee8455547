"""What is measured: a burst of requests, open loops, and turns with a server of diffusers."""

__all__ = ["Burst", "OpenLoop", "Turns", "ask", "bursts", "capacity", "likeness", "open_loops", "turns"]

import asyncio
import base64
import io
import json
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdxl_trt.benchmarks.serving.client import Answer, burst, closed_loop, open_loop, post
from sdxl_trt.benchmarks.serving.probe import percentile, slope, watching
from sdxl_trt.benchmarks.serving.servers import Server

PATH = "/v1/images/generations"
OK, TOO_MANY = 200, 429
PROMPTS = ("a red star", "a blue circle on a white ground", "a green square", "two yellow triangles")
LOADS = (0.5, 0.8, 0.95)
CLIENTS = 8
"""Clients of a closed loop that measures what a server can do: enough to fill its calls."""
WARM = 0.2
"""The share of an open loop in which the server's memory may grow: its stores of answers and places fill."""
LONGEST_RETRY = 120
_MINUTE = 60.0
_UNET = re.compile(r'^trt_stage_duration_seconds_sum\{stage="(?:base|refiner)"\} (\S+)$', re.MULTILINE)


class Burst(msgspec.Struct, frozen=True):
    """Requests that came at once. `before_last` are pictures drawn before the last request was answered or taken.

    `strange` are pictures that are not nearest to the one that their own request draws alone, `likeness` the lowest
    PSNR (dB) with it. `live` are seconds at the 99th percentile.
    """

    sent: int
    accepted: int
    refused: int
    other: int
    wrong_retry: int
    before_last: int
    strange: int
    likeness: float
    live: float
    growth: float


class OpenLoop(msgspec.Struct, frozen=True):
    """Requests at random times, `load` of the capacity; seconds at three percentiles of those that were drawn.

    `unets` is the share of the time in calls of UNets, `growth` the slope of the resident memory in bytes a minute
    after the share WARM of the time.
    """

    load: float
    rate: float
    seconds: float
    drawn: int
    refused: int
    lost: int
    p50: float
    p95: float
    p99: float
    unets: float
    live: float
    growth: float


class Turns(msgspec.Struct, frozen=True):
    """Closed loops in turns: pictures a second and the 95th percentile of seconds, a turn each; the pictures' PSNR."""

    clients: int
    ours: list[tuple[float, float]]
    theirs: list[tuple[float, float]]
    likeness: float


def ask(size: str, steps: int, first: int = 0) -> Callable[[int], dict[str, Any]]:
    """Return what asks for the picture of a number: its own prompt and seed, from seed `first` on."""

    def body(number: int) -> dict[str, Any]:
        return {"prompt": PROMPTS[number % len(PROMPTS)], "size": size, "steps": steps, "seed": first + number,
                "guidance_scale": 5.0, "handoff": 0.75}  # fmt: skip

    return body


def bursts(server: Server, size: str, steps: int, count: int, rounds: int) -> list[Burst]:
    """Send `count` requests at once, `rounds` times after one that warms up; every picture is drawn again alone."""
    asked, found = ask(size, steps), []
    for number in range(rounds + 1):
        with watching(server.port, server.pid) as seen:
            answers = asyncio.run(burst(server.port, PATH, asked, count))
        if number:
            found.append(_burst(answers, server, asked, percentile(seen.live, 0.99), slope(seen.memory) * _MINUTE))
    return found


def _burst(
    answers: Sequence[Answer], server: Server, asked: Callable[[int], dict[str, Any]], live: float, growth: float
) -> Burst:
    drawn = [answer for answer in answers if answer.status == OK]
    refused = [answer for answer in answers if answer.status == TOO_MANY]
    retries = [int(answer.retry_after) if answer.retry_after.isdecimal() else 0 for answer in refused]
    last = max((answer.started + answer.seconds for answer in refused), default=0.0)
    strange, worst = _compared(drawn, server, asked)
    return Burst(
        len(answers), len(drawn), len(refused), len(answers) - len(drawn) - len(refused),
        sum(not 1 <= seconds <= LONGEST_RETRY for seconds in retries),
        sum(answer.started + answer.seconds < last for answer in drawn), strange, worst, live, growth,
    )  # fmt: skip


def _compared(drawn: Sequence[Answer], server: Server, asked: Callable[[int], dict[str, Any]]) -> tuple[int, float]:
    """Return how many pictures are nearer to another one drawn alone than to their own, and the lowest PSNR."""
    if not drawn:
        return 0, float("nan")
    alone = [asyncio.run(post(server.port, PATH, asked(answer.number))) for answer in drawn]
    ours, theirs = [_pixels(answer) for answer in drawn], [_pixels(answer) for answer in alone]
    strange = sum(
        number != min(range(len(theirs)), key=lambda other: float(np.abs(picture - theirs[other]).sum()))
        for number, picture in enumerate(ours)
    )
    return strange, min(likeness(picture, own) for picture, own in zip(ours, theirs, strict=True))


def _pixels(answer: Answer) -> NDArray[np.float32]:
    file = base64.b64decode(json.loads(answer.body)["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"), np.float32)


def likeness(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    """Return the PSNR of two pictures (h, w, 3) of 0 to 255, in dB; infinite if they are equal."""
    error = float(np.mean(np.square(first - second)))
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def capacity(server: Server, size: str, steps: int, seconds: float) -> float:
    """Return how many pictures a second a server draws for clients that ask again and again."""
    answers = asyncio.run(closed_loop(server.port, PATH, ask(size, steps), clients=CLIENTS, seconds=seconds))
    return _throughput(answers)


def _throughput(answers: Sequence[Answer]) -> float:
    began = min(answer.started for answer in answers)
    ended = max(answer.started + answer.seconds for answer in answers)
    return sum(answer.status == OK for answer in answers) / (ended - began)


def open_loops(server: Server, size: str, steps: int, full: float, seconds: float) -> list[OpenLoop]:
    """Send requests at random times at each of LOADS of the capacity `full` (pictures a second)."""
    found = []
    for load in LOADS:
        before, began = _unet_seconds(server), time.perf_counter()
        with watching(server.port, server.pid) as seen:
            answers = asyncio.run(
                open_loop(server.port, PATH, ask(size, steps), rate=load * full, seconds=seconds, seed=int(100 * load))
            )
        spent = time.perf_counter() - began
        drawn = [answer.seconds for answer in answers if answer.status == OK]
        refused = sum(answer.status == TOO_MANY for answer in answers)
        found.append(
            OpenLoop(
                load, load * full, spent, len(drawn), refused, len(answers) - len(drawn) - refused,
                percentile(drawn, 0.5), percentile(drawn, 0.95), percentile(drawn, 0.99),
                (_unet_seconds(server) - before) / spent, percentile(seen.live, 0.99),
                slope(seen.memory, WARM) * _MINUTE,
            )
        )  # fmt: skip
    return found


def _unet_seconds(server: Server) -> float:
    """Return the seconds that the server has spent in calls of its UNets, from its metrics."""
    return sum(float(value) for value in _UNET.findall(server.get("/metrics").decode()))


def turns(ours: Server, theirs: Server, size: str, steps: int, *, rounds: int, seconds: float, clients: int) -> Turns:
    """Have both servers draw in turns, after a picture each that warms them up; the pictures of a seed are compared."""
    asked, servers = ask(size, steps), (ours, theirs)
    pictures = [_pixels(asyncio.run(post(server.port, PATH, asked(0)))) for server in servers]
    found: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
    for turn in range(rounds):
        for which in (0, 1) if turn % 2 == 0 else (1, 0):
            answers = asyncio.run(closed_loop(servers[which].port, PATH, asked, clients=clients, seconds=seconds))
            drawn = [answer.seconds for answer in answers if answer.status == OK]
            found[which].append((_throughput(answers), percentile(drawn, 0.95)))
    return Turns(clients, *found, likeness(*pictures))
