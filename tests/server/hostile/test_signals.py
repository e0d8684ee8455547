"""Signals at every stage of a picture, what stays behind, and what of its clients a server has told anybody."""

import json
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from sdxl_trt.server.http import key_id

DRAW = "/v1/images/generations"
ASKED = {"prompt": "MARKERWORD", "negative_prompt": "MARKERWORD", "size": "128x128", "steps": 24, "n": 2,
         "user": "MARKERWORD", "stream": True, "partial_images": 3}  # fmt: skip
STAGES = ("waiting", "base", "refiner", "decode")


def draws(kit: Any, server: Any, answers: list[bytes]) -> threading.Thread:
    """Ask for pictures from another thread; their events are `answers`."""

    def ask() -> None:
        body = json.dumps(ASKED).encode()
        with server.connect() as connection:
            connection.sendall(kit.head("POST", DRAW, Content_Length=str(len(body))) + body)
            while part := connection.recv(65536):
                answers.append(part)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


def reached(server: Any, stage: str) -> None:
    """Wait until a picture is at `stage`."""
    place = {"waiting": "base", "decode": "refiner"}.get(stage, stage)
    while f'trt_inflight_pictures{{state="{place}"}} 0.0' in server.ask("GET", "/metrics")[1].decode():
        time.sleep(0.02)  # another process tells us in no other way


def left(server: Any) -> list[str]:
    """Return what lies in the folder for temporary files, without the session id that ONNX Runtime writes there."""
    return [str(path) for path in server.temporary.rglob("*") if path.name != ".ses"]


@pytest.mark.parametrize("stage", STAGES)
def test_at_sigterm_what_runs_is_finished_and_nothing_stays(kit: Any, start: Callable[..., Any], stage: str) -> None:
    server, answers = start(), list[bytes]()
    thread = draws(kit, server, answers)
    reached(server, stage)
    server.process.send_signal(signal.SIGTERM)
    status = 0
    while status in {200, 0}:
        try:
            status = server.ask("GET", "/health/ready")[0]
        except ConnectionError:
            break
    assert status in (503, 0)
    assert server.process.wait(60) == 0
    thread.join()
    told = b"".join(answers)
    assert told.count(b"image_generation.completed") >= 2
    assert left(server) == []
    assert_silent(server)


def test_a_second_signal_ends_at_the_next_step(kit: Any, start: Callable[..., Any]) -> None:
    server, answers = start(), list[bytes]()
    thread = draws(kit, server, answers)
    reached(server, "base")
    server.process.send_signal(signal.SIGTERM)
    while server.ask("GET", "/health/ready")[0] != 503:
        pass
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0
    thread.join()
    assert b"image_generation.completed" not in b"".join(answers)
    assert left(server) == []


@pytest.mark.parametrize("stage", STAGES)
def test_sigkill_leaves_no_files(kit: Any, start: Callable[..., Any], replay: Any, stage: str) -> None:
    server, answers = start(), list[bytes]()
    form = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n%s\r\n--b--\r\n'
    assert server.ask("POST", "/upload/image", form % replay.picture(),
                      Content_Type="multipart/form-data; boundary=b")[0] == 200  # fmt: skip
    assert left(server)
    thread = draws(kit, server, answers)
    reached(server, stage)
    assert server.end(signal.SIGKILL) == -signal.SIGKILL
    thread.join()
    end = time.monotonic() + 10
    while left(server):
        assert time.monotonic() < end, left(server)


def test_sighup_reloads_and_running_pictures_end(kit: Any, start: Callable[..., Any]) -> None:
    server, answers = start(), list[bytes]()
    thread = draws(kit, server, answers)
    reached(server, "base")
    server.process.send_signal(signal.SIGHUP)
    while "the bundle was loaded anew" not in server.log.read_text():
        assert server.process.poll() is None
    thread.join()
    assert b"".join(answers).count(b"image_generation.completed") >= 2
    small = json.dumps({**ASKED, "stream": False, "partial_images": 0, "size": "64x64", "steps": 2}).encode()
    assert server.ask("POST", DRAW, small)[0] == 200
    assert server.ask("POST", "/admin/reload")[0] == 200
    assert server.end() == 0
    assert_silent(server)


def assert_silent(server: Any) -> None:
    """Assert that a server which has ended wrote nothing that its clients sent."""
    for path in (server.log, server.out):
        text = path.read_text()
        assert "MARKER" not in text
        assert "Traceback" not in text
        assert str(server.temporary) not in text


def test_nothing_that_clients_sent_is_told_to_others(
    kit: Any, start: Callable[..., Any], graph: dict[str, Any]
) -> None:
    server = start()
    small = {"prompt": "MARKERWORD", "size": "64x64", "steps": 2, "user": "MARKERWORD"}
    for body in (small, {**small, "size": "MARKERWORD"}, {**small, "MARKERWORD": 1}, {**small, "steps": "MARKERWORD"},
                 {**small, "loras": [{"name": "MARKERWORD"}]}, {**small, "model": "MARKERWORD"}):  # fmt: skip
        server.ask("POST", DRAW, json.dumps(body).encode(), User_Agent="MARKERWORD", Referer="http://MARKERWORD/")
    server.ask("POST", "/MARKERWORD?MARKERWORD=1", b"MARKERWORD")
    server.ask("POST", DRAW, json.dumps(small).encode(), key="MARKERWORD")
    server.ask("MARKERWORD", DRAW)
    server.ask("GET", "/view?filename=MARKERWORD&type=output")
    status, told = server.ask("POST", "/prompt", json.dumps({"prompt": graph, "client_id": "MARKERWORD"}).encode())
    assert status == 200
    identity = json.loads(told)["prompt_id"]
    while server.ask("GET", f"/history/{identity}")[1] == b"{}":
        pass
    for path in ("/history", f"/history/{identity}", "/queue", "/api/jobs", f"/api/jobs/{identity}", "/object_info",
                 "/metrics", "/v1/models", "/openapi.json", "/system_stats", "/health/ready"):  # fmt: skip
        assert b"MARKER" not in server.ask("GET", path, key=kit.OTHER)[1], path
    metrics = server.ask("GET", "/metrics")[1].decode()
    for key in kit.KEYS[:2]:
        assert key_id(key) not in metrics
    assert "127.0.0.1" not in metrics
    assert server.end() == 0
    assert_silent(server)
    assert key_id(kit.OWN) in server.log.read_text()
    assert '"generate"' in server.out.read_text(), "spans were written"
    assert server.temporary.name not in metrics
