"""Websockets: too many, too loud, too large, of strangers, and of those who vanish."""

import json
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest

MIB = 1 << 20
MASKED = b"\x81\x82\0\0\0\0hi"
"""A message of two letters, as a client sends it."""


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def graph(steps: int) -> dict[str, Any]:
    return {
        "3": node("KSampler", seed=7, steps=steps, cfg=7.0, sampler_name="euler", scheduler="normal", denoise=1.0,
                  model=["4", 0], positive=["6", 0], negative=["6", 0], latent_image=["5", 0]),
        "4": node("CheckpointLoaderSimple", ckpt_name="base"),
        "5": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "6": node("CLIPTextEncode", text="MARKERWORD", clip=["4", 1]),
        "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "9": node("SaveImage", filename_prefix="MARKERWORD", images=["8", 0]),
    }  # fmt: skip


@pytest.fixture(autouse=True)
def freed(server: Any) -> Iterator[None]:
    """Every test begins and ends with all places for websockets free."""
    yield
    while "trt_websockets 0.0" not in server.ask("GET", "/metrics")[1].decode():
        pass


def test_of_a_thousand_sockets_64_stay_and_the_others_are_told_to_come_later(kit: Any, server: Any) -> None:
    with ExitStack() as stack:
        statuses = []
        for number in range(1000):
            connection, status = server.open_socket(key=kit.KEYS[number // 4])
            stack.callback(connection.close)
            statuses.append(status)
        assert (statuses.count(101), statuses.count(503)) == (64, 936)
        assert server.ask("GET", "/health/live")[0] == 200


def test_one_client_has_four_sockets(server: Any) -> None:
    with ExitStack() as stack:
        opened = [server.open_socket() for _ in range(5)]
        for connection, _ in opened:
            stack.callback(connection.close)
        assert [status for _, status in opened] == [101, 101, 101, 101, 503]


def test_a_socket_that_says_too_much_is_closed(kit: Any, server: Any) -> None:
    server.forget_peak()
    before = server.memory()
    connection, _ = server.open_socket()
    with connection:
        with suppress(OSError):
            for _ in range(1000):
                connection.sendall(MASKED * 100)
        assert kit.close_code(connection) in (1008, 0)
    taken = server.memory("VmHWM") - before
    sys.stdout.write(f"100,000 messages: {taken / MIB:.1f} MiB\n")
    assert taken < 16 * MIB


def test_eleven_messages_are_too_many_for_a_second(kit: Any, server: Any) -> None:
    connection, _ = server.open_socket()
    with connection:
        connection.sendall(MASKED * 11)
        assert kit.close_code(connection) == 1008


def test_a_message_of_10_mib_is_not_taken(kit: Any, server: Any) -> None:
    server.forget_peak()
    before = server.memory()
    connection, _ = server.open_socket()
    with connection:
        with suppress(OSError):
            connection.sendall(b"\x81\xff" + struct.pack(">Q", 10 * MIB) + bytes(4) + bytes(10 * MIB))
        assert kit.close_code(connection) in (1009, 0)
    assert server.memory("VmHWM") - before < 4 * MIB


def test_a_page_of_another_origin_opens_none(server: Any) -> None:
    connection, status = server.open_socket(Origin="http://evil.example")
    connection.close()
    assert status == 403


def test_another_key_with_the_same_client_id_hears_nothing(kit: Any, server: Any) -> None:
    with ExitStack() as stack:
        own, _ = server.open_socket("/ws?clientId=a")
        stack.callback(own.close)
        other, _ = server.open_socket("/ws?clientId=a", kit.OTHER)
        stack.callback(other.close)
        asked = json.dumps({"prompt": graph(2), "client_id": "a"}).encode()
        status, told = server.ask("POST", "/prompt", asked)
        assert status == 200
        identity = json.loads(told)["prompt_id"]
        for _, payload in kit.frames(own):
            said = json.loads(payload)
            if said["type"] == "executing" and said["data"]["node"] is None:
                break
        other.settimeout(0.5)
        heard = []
        with suppress(TimeoutError):
            heard = [json.loads(payload)["type"] for _, payload in kit.frames(other)]
        assert set(heard) <= {"status"}
        assert identity.encode() in server.ask("GET", "/history")[1]
        assert server.ask("GET", "/history", key=kit.OTHER)[1] == b"{}"
        assert server.ask("GET", f"/history/{identity}", key=kit.OTHER)[1] == b"{}"


def test_a_job_outlives_a_client_that_vanishes(kit: Any, server: Any) -> None:
    connection, _ = server.open_socket("/ws?clientId=b")
    asked = json.dumps({"prompt": graph(8), "client_id": "b"}).encode()
    identity = json.loads(server.ask("POST", "/prompt", asked)[1])["prompt_id"]
    next(kit.frames(connection))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    while (told := server.ask("GET", f"/history/{identity}")[1]) == b"{}":
        pass
    assert json.loads(told)[identity]["status"]["completed"]
