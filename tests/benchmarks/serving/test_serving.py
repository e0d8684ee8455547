"""The benchmark of trt-serve: its client, what it concludes from answers, and its report."""

import asyncio
import base64
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from sdxl_trt.benchmarks.serving import __main__ as serving
from sdxl_trt.benchmarks.serving import cases
from sdxl_trt.benchmarks.serving.client import Answer, burst, closed_loop, open_loop
from sdxl_trt.benchmarks.serving.probe import percentile, slope
from sdxl_trt.benchmarks.serving.servers import Server


def _body(grey: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (grey, grey, grey)).save(file, "PNG")
    return json.dumps({"data": [{"b64_json": base64.b64encode(file.getvalue()).decode()}]}).encode()


def test_the_client_reads_whole_answers_and_counts_lost_ones() -> None:
    asked: list[dict[str, Any]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
        asked.append(json.loads(await reader.readexactly(length)))
        number = asked[-1]["number"]
        if number == 1:
            writer.write(b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 7\r\nContent-Length: 2\r\n\r\n{}")
        elif number == 2:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\ncut")
        elif number != 3:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwhole")
        writer.close()

    def ask(number: int) -> Mapping[str, Any]:
        return {"number": number}

    async def main() -> tuple[list[Answer], list[Answer], list[Answer]]:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return (
                await burst(port, "/", ask, 5),
                await closed_loop(port, "/", ask, clients=2, seconds=0.02, first=10),
                await open_loop(port, "/", lambda number: {"number": number + 1000}, rate=400, seconds=0.02),
            )

    at_once, again, random = asyncio.run(main())
    assert [(each.number, each.status) for each in at_once] == [(0, 200), (1, 429), (2, 0), (3, 0), (4, 200)]
    assert (at_once[0].body, at_once[1].retry_after) == (b"whole", "7")
    assert sorted(each.number for each in again) == list(range(10, 10 + len(again)))
    assert len(again) >= 2
    assert [each.status for each in random] == [200] * len(random)
    assert len({each["number"] for each in asked}) == len(asked)


@pytest.mark.parametrize("swapped", [False, True])
def test_pictures_of_others_are_found(swapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def post(port: int, path: str, body: Mapping[str, Any], number: int = 0) -> Answer:
        return Answer(number, 200, 0.0, 1.0, body=_body(10 * body["seed"]))

    monkeypatch.setattr(cases, "post", post)
    answers = [
        Answer(0, 200, 0.0, 1.0, body=_body(10 if swapped else 1)), Answer(1, 200, 0.0, 9.0, body=_body(10)),
        Answer(2, 429, 0.0, 2.0, "120"), Answer(3, 429, 0.0, 2.0, "0"), Answer(4, 0, 0.0, 2.0),
    ]  # fmt: skip
    found = cases._burst(answers, Server(1, 1), cases.ask("64x64", 2), 0.01, 0.0)
    assert (found.sent, found.accepted, found.refused, found.other, found.wrong_retry) == (5, 2, 2, 1, 1)
    assert (found.before_last, found.strange) == (1, int(swapped))
    assert found.likeness == pytest.approx(20 * np.log10(255 / (10 if swapped else 1)))


@pytest.mark.parametrize(
    ("change", "missed"),
    [({}, []), ({"accepted": 31}, ["accepted"]), ({"accepted": 38}, ["accepted"]), ({"other": 1}, ["answered"]),
     ({"wrong_retry": 1}, ["answered"]), ({"strange": 1}, ["their pictures"]), ({"likeness": 49.0}, ["their pictures"]),
     ({"live": 0.06}, ["GET /health/live"])],
)  # fmt: skip
def test_every_bar_can_be_missed(change: dict[str, Any], missed: Sequence[str]) -> None:
    proper = cases.Burst(1000, 37, 963, 0, 0, 1, 0, 60.0, 0.01, 0.0)
    bars = serving.bars([msgspec.structs.replace(proper, **change)], [], None, 4)
    assert [bar.what for bar in bars if bar.met is False] == [
        bar.what for bar in bars if any(word in bar.what for word in missed)
    ]


def test_ratios_are_of_the_same_turn() -> None:
    turns = cases.Turns(4, [(4.0, 1.0), (2.0, 2.0), (4.0, 1.0)], [(1.0, 2.0), (1.0, 4.0), (1.0, 2.0)], 60.0)
    assert serving._ratios(turns) == (0.25, 0.5)
    bars = serving.bars([], [], turns, 4)
    assert [bar.met for bar in bars] == [None, None, None, None, True, True]


def test_figures_of_samples() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([float(value) for value in range(100)], 0.99) == 98.0
    assert slope([(0.0, 100), (1.0, 110), (2.0, 120)]) == pytest.approx(10.0)
    assert np.isnan(percentile([], 0.5))
    assert slope([(0.0, 0), (1.0, 100), (5.0, 140), (10.0, 190)], 0.1) == pytest.approx(10.0)
    assert np.isnan(slope([(0.0, 1)]))


def test_the_share_of_unets_is_read_from_the_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    text = b"""trt_stage_duration_seconds_sum{stage="base"} 1.5
trt_stage_duration_seconds_sum{stage="decode"} 9.0
trt_stage_duration_seconds_sum{stage="refiner"} 0.25
trt_stage_duration_seconds_count{stage="refiner"} 3.0
"""
    monkeypatch.setattr(Server, "get", lambda *_: text)
    assert cases._unet_seconds(Server(1, 1)) == 1.75


def test_the_report_shows_everything() -> None:
    loop = cases.OpenLoop(0.8, 2.0, 300.0, 590, 0, 0, 0.5, 1.0, 1.5, 0.7, 0.01, 1000.0)
    turns = cases.Turns(4, [(4.0, 1.0)], [(1.0, 4.0)], 60.0)
    report = serving.Report({}, {}, (0.0, 1.0), 4, 2.5, [], [loop], turns, serving.bars([], [loop], turns, 4))
    text = serving.table(report)
    assert "| 80% | 300 | 590 | 0 | 0 | 0.50 s | 1.00 s | 1.50 s | 70% | 10.0 ms | +0.00 MiB/min |" in text
    assert "| diffusers | 1.00 | 4.00 |" in text
