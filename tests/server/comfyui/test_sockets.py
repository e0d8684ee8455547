"""Websockets: how many, how fast, whose frames, and clients that do not read."""

import asyncio
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect

from sdxl_trt.server import Options
from sdxl_trt.server.comfyui import sockets as module

Json = dict[str, Any]
Fake = Callable[..., tuple[TestClient, Any]]
KEYS = frozenset({"own-key", "another-key"})


def _closed(socket: Any) -> int:
    try:
        while True:
            socket.receive_text()
    except WebSocketDisconnect as exc:
        return exc.code


def test_the_fifth_socket_of_one_is_refused_until_another_closes(fake: Fake) -> None:
    from contextlib import ExitStack

    client, _ = fake()
    with ExitStack() as stack:
        for number in range(4):
            socket = stack.enter_context(client.websocket_connect(f"/api/ws?clientId={number}"))
            assert socket.receive_json()["type"] == "status"
        with pytest.raises(WebSocketDenialResponse) as refused, client.websocket_connect("/ws"):
            pass
        assert refused.value.status_code == 503
        assert refused.value.json()["node_errors"] == {}
    for _ in range(6):  # their places are free again
        with client.websocket_connect("/ws?clientId=8") as socket:
            assert socket.receive_json()["data"]["sid"] == "8"


def test_a_page_of_another_origin_and_a_client_without_key_hear_nothing(fake: Fake) -> None:
    client, _ = fake()
    for headers, status in (({"Origin": "http://evil.example"}, 403), ({"Authorization": "Bearer wrong"}, 401)):
        with pytest.raises(WebSocketDenialResponse) as refused, client.websocket_connect("/ws", headers=headers):
            pass
        assert refused.value.status_code == status


def test_a_socket_without_an_id_gets_one(fake: Fake) -> None:
    client, _ = fake()
    with client.websocket_connect("/ws") as socket:
        assert len(socket.receive_json()["data"]["sid"]) == 32
    with pytest.raises(WebSocketDenialResponse), client.websocket_connect("/ws?clientId=" + "x" * 200):
        pass


def test_too_many_messages_end_a_socket_and_leave_no_job_behind(fake: Fake) -> None:
    client, _ = fake()
    with client.websocket_connect("/ws?clientId=one") as socket:
        for _ in range(11):
            socket.send_text("{}")
        assert _closed(socket) == 1008
    with client.websocket_connect("/ws?clientId=one") as socket:
        assert socket.receive_json()["type"] == "status"


@pytest.mark.parametrize("text", ["", "[" * 5000, "null", "3", '{"type": "feature_flags"}', '{"type": []}',
                                  '{"type": "feature_flags", "data": 3}'])  # fmt: skip
def test_strange_messages_are_passed_over(fake: Fake, text: str) -> None:
    client, _ = fake()
    with client.websocket_connect("/ws?clientId=one") as socket:
        socket.receive_json()
        socket.send_text(text)
        socket.send_bytes(b"\x00")
        socket.send_text(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))
        told = socket.receive_json()
    assert told == {"type": "feature_flags", "data": {"supports_preview_metadata": True,
                                                      "max_upload_size": Options().max_body}}  # fmt: skip


def test_the_same_id_of_another_hears_nothing(fake: Fake, graph: Json, stranger: dict[str, str]) -> None:
    client, desk = fake(held=True)
    with (
        client.websocket_connect("/ws?clientId=one") as own,
        client.websocket_connect("/ws?clientId=one", headers=stranger) as another,
    ):
        own.receive_json()
        client.post("/prompt", json={"prompt": graph, "client_id": "one"})
        while own.receive_json()["type"] != "executing":
            pass
        desk.held = False
        while own.receive_json()["data"].get("node", "") is not None:
            pass
        client.post("/prompt", json={"prompt": graph, "client_id": "two"}, headers=stranger)
        frames = [another.receive_json() for _ in range(3)]
    assert [frame["type"] for frame in frames] == ["status", "status", "status"]
    remaining = [frame["data"]["status"]["exec_info"]["queue_remaining"] for frame in frames]
    assert remaining == [0, 1, 0]


def test_a_second_socket_replaces_the_first(fake: Fake, graph: Json) -> None:
    client, desk = fake(held=True)
    with client.websocket_connect("/ws?clientId=one") as first:
        first.receive_json()
        client.post("/prompt", json={"prompt": graph, "client_id": "one"})
        while first.receive_json()["type"] != "executing":
            pass
        with client.websocket_connect("/ws?clientId=one") as second:
            assert _closed(first) == 1000
            assert second.receive_json()["data"]["status"]["exec_info"]["queue_remaining"] == 1
            working = second.receive_json()
            assert working["type"] == "executing"
            assert working["data"].keys() == {"node", "display_node", "prompt_id"}
            desk.held = False
            while second.receive_json()["data"].get("node", "") is not None:
                pass


@pytest.mark.parametrize(("policy", "stops"), [(None, None), ("cancel", "cancelled"), ("finish-if-started", None)])
def test_a_client_that_leaves(fake: Fake, graph: Json, policy: Any, stops: str | None) -> None:
    client, desk = fake(Options(on_disconnect=policy, keys=KEYS), held=True)
    with client.websocket_connect("/ws?clientId=one") as socket:
        client.post("/prompt", json={"prompt": graph, "client_id": "one"})
        while socket.receive_json()["type"] != "executing":
            pass
    for _ in range(100 if stops else 3):  # the server hears of it in a moment
        client.get("/queue")
        if desk.tickets[0].stop == stops is not None:
            break
    assert desk.tickets[0].stop == stops


def test_a_client_that_does_not_read_loses_progress_first_and_then_its_socket() -> None:
    async def main() -> None:
        socket = module._Socket(SimpleNamespace(), "who", "one")  # type: ignore[arg-type]
        for number in range(1000):
            socket.put(str(number), droppable=True)
        assert socket.frames.qsize() <= module.MOST_WAITING // 2 + 1
        for number in range(1000):
            socket.put(str(number), droppable=False)
            if socket.code == 1013:
                break
        assert socket.frames.qsize() == 1
        assert await socket.frames.get() is None

    asyncio.run(main())
