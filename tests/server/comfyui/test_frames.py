"""The order of frames, the history at the moment when nothing remains, stops, and previews."""

import asyncio
import json
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from sdxl_trt.engines import UsageError
from sdxl_trt.server import Options
from sdxl_trt.server.desk import Drawn, Ended, Stepped, Ticket

Json = dict[str, Any]
Fake = Callable[..., tuple[TestClient, Any]]
KEYS = frozenset({"own-key", "another-key"})


def _queue(client: TestClient, graph: Json, **more: Any) -> str:
    answer = client.post("/prompt", json={"prompt": graph, "client_id": "one", **more})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["prompt_id"])


def _to_the_end(socket: Any) -> list[Json]:
    frames: list[Json] = []
    while not frames or frames[-1]["type"] != "executing" or frames[-1]["data"]["node"] is not None:
        frames.append(socket.receive_json())
    return frames


def test_frames_come_in_comfyuis_order(fake: Fake, graph: Json) -> None:
    client, _ = fake()
    with client.websocket_connect("/ws?clientId=one") as socket:
        first = socket.receive_json()
        identity = _queue(client, graph)
        frames = _to_the_end(socket)
    assert first == {"type": "status", "data": {"status": {"exec_info": {"queue_remaining": 0}}, "sid": "one"}}
    kinds = [frame["type"] for frame in frames]
    assert kinds == [
        "status", "execution_start", "execution_cached", "executing", "executing", "progress_state", "progress",
        "progress_state", "progress", "executing", "executing", "executed", "execution_success", "status", "executing",
    ]  # fmt: skip
    assert all(frame["data"]["prompt_id"] == identity for frame in frames if frame["type"] != "status")
    assert all(frame["data"].keys() == {"node", "display_node", "prompt_id"} for frame in frames
               if frame["type"] == "executing")  # fmt: skip
    remaining = [each["data"]["status"]["exec_info"]["queue_remaining"] for each in frames if each["type"] == "status"]
    assert remaining == [1, 0]
    state = frames[7]["data"]["nodes"]["3"]
    assert state == {"value": 2, "max": 2, "state": "running", "node_id": "3", "prompt_id": identity,
                     "display_node_id": "3", "parent_node_id": None, "real_node_id": "3"}  # fmt: skip
    assert isinstance(frames[1]["data"]["timestamp"], int)
    named = frames[11]["data"]["output"]["images"]
    assert named == [{"filename": "ComfyUI_00001_.png", "subfolder": "", "type": "output"}]


def test_an_entry_of_the_history_has_what_clients_read(fake: Fake, graph: Json) -> None:
    client, _ = fake()
    with client.websocket_connect("/ws?clientId=one") as socket:
        identity = _queue(client, graph, extra_data={"api_key_comfy_org": "secret", "x": 1})
        _to_the_end(socket)
    whole = client.get("/history").json()
    assert whole == client.get(f"/api/history/{identity}").json()
    entry = whole[identity]
    number, same, nodes, extra, outputs = entry["prompt"]
    assert (number, same, nodes, outputs) == (0, identity, graph, ["9"])
    assert extra.keys() == {"x", "client_id", "create_time"}
    assert entry["status"]["status_str"] == "success"
    assert entry["status"]["completed"] is True
    assert [kind for kind, _ in entry["status"]["messages"]] == [
        "execution_start", "execution_cached", "execution_success"]  # fmt: skip
    assert entry["meta"]["9"]["real_node_id"] == "9"
    assert client.get("/history/unknown").json() == {}
    job = client.get(f"/api/jobs/{identity}").json()
    assert (job["status"], job["outputs_count"], job["workflow"]["prompt"]) == ("completed", 1, graph)
    assert [each["id"] for each in client.get("/api/jobs?status=completed").json()["jobs"]] == [identity]
    assert client.post("/history", json={"delete": [identity]}).status_code == 200
    assert client.get("/history").json() == {}
    assert client.get("/view", params=entry["outputs"]["9"]["images"][0]).status_code == 404


async def _asked(app: FastAPI, path: str, body: Json | None = None) -> Json:
    """Return what an application answers, without what a client adds: a test asks two thousand times."""
    sent: list[bytes] = []
    came = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Json:
        return came.pop() if came else {"type": "http.disconnect"}

    async def send(message: Json) -> None:
        sent.append(message.get("body", b""))

    headers = [(b"host", b"127.0.0.1:8188"), (b"content-length", b"1")]
    await app({"type": "http", "method": "POST" if body else "GET", "path": path, "raw_path": path.encode(),
               "query_string": b"", "headers": headers, "client": ("127.0.0.1", 1), "scheme": "http",
               "server": ("127.0.0.1", 8188), "http_version": "1.1", "root_path": ""}, receive, send)  # fmt: skip
    found: Json = json.loads(b"".join(sent))
    return found


def test_the_history_is_there_whenever_nothing_remains(alone: Callable[[], FastAPI], graph: Json) -> None:
    """A client stops at queue_remaining 0 and reads the history once; 200 times."""

    async def main() -> None:
        app = alone()
        for number in range(200):
            identity = (await _asked(app, "/prompt", {"prompt": graph}))["prompt_id"]
            await app.state.desk.tickets[-1].wait()
            while (await _asked(app, "/prompt"))["exec_info"]["queue_remaining"]:
                await asyncio.to_thread(int)  # the threads that write pictures get their turn
            entry = await _asked(app, f"/history/{identity}")
            assert entry[identity]["outputs"]["9"]["images"], number
        assert len(await _asked(app, "/history")) == 100

    asyncio.run(main())


def test_the_history_has_at_most_a_hundred_entries_in_pieces(fake: Fake, graph: Json) -> None:
    client, _ = fake()
    identities = []
    with client.websocket_connect("/ws?clientId=one") as socket:
        for _ in range(4):
            identities.append(_queue(client, graph))
            _to_the_end(socket)
    assert [*client.get("/history").json()] == identities
    assert [*client.get("/history?max_items=2").json()] == identities[2:]
    assert [*client.get("/history?max_items=2&offset=1").json()] == identities[1:3]
    assert client.get("/history?max_items=x").status_code == 400


def test_an_interrupt_by_a_stranger_does_nothing(fake: Fake, graph: Json, stranger: dict[str, str]) -> None:
    client, desk = fake(held=True)
    with client.websocket_connect("/ws?clientId=one") as socket:
        identity = _queue(client, graph)
        while socket.receive_json()["type"] != "executing":
            pass
        for body in (None, {"prompt_id": identity}):
            assert client.post("/interrupt", json=body, headers=stranger).status_code == 200
        assert client.post(f"/api/jobs/{identity}/cancel", headers=stranger).json() == {"cancelled": False}
        assert client.post("/queue", json={"clear": True}, headers=stranger).status_code == 200
        assert desk.tickets[0].stop is None
        for path in ("/history", "/queue", "/api/jobs"):
            assert identity not in client.get(path, headers=stranger).text
        assert client.get("/prompt", headers=stranger).json()["exec_info"]["queue_remaining"] == 0
        assert client.get(f"/api/jobs/{identity}", headers=stranger).status_code == 404
        assert client.post("/interrupt").status_code == 200
        frames = _to_the_end(socket)
    assert [frame["type"] for frame in frames] == ["execution_interrupted", "status", "executing"]
    assert frames[0]["data"]["node_type"] == "CLIPTextEncode"
    entry = client.get(f"/history/{identity}").json()[identity]
    assert (entry["status"]["status_str"], entry["status"]["completed"]) == ("error", False)
    assert client.get(f"/api/jobs/{identity}").json()["status"] == "cancelled"
    assert client.post(f"/api/jobs/{identity}/cancel").json() == {"cancelled": False}


def test_interrupt_all_stops_whoever_runs(fake: Fake, graph: Json, stranger: dict[str, str]) -> None:
    client, _ = fake(Options(interrupt_all=True, keys=KEYS), held=True)
    with client.websocket_connect("/ws?clientId=one") as socket:
        _queue(client, graph)
        while socket.receive_json()["type"] != "executing":
            pass
        client.post("/interrupt", headers=stranger)
        assert _to_the_end(socket)[0]["type"] == "execution_interrupted"


def test_a_job_that_waits_is_taken_out_of_the_queue(fake: Fake, graph: Json) -> None:
    client, desk = fake(held=True, starts=False)
    identity = _queue(client, graph)
    _, same, _, _, outputs = client.get("/queue").json()["queue_pending"][0]
    assert (same, outputs) == (identity, ["9"])
    client.post("/queue", json={"delete": ["another"]})
    assert client.get("/prompt").json()["exec_info"]["queue_remaining"] == 1
    client.post("/queue", json={"delete": [identity]})
    assert client.get("/queue").json() == {"queue_running": [], "queue_pending": []}
    assert client.get("/prompt").json()["exec_info"]["queue_remaining"] == 0
    assert desk.tickets[0].stop == "cancelled"
    assert client.get("/history").json() == {}


@pytest.mark.parametrize(("error", "message"), [
    (UsageError("node 3: steps are wrong"), "node 3: steps are wrong"),
    (RuntimeError("/home/somebody/secret"), "it failed; the log of the server says why"),
])  # fmt: skip
def test_a_failure_is_told_without_anything_of_this_machine(
    fake: Fake, graph: Json, error: Exception, message: str
) -> None:
    client, _ = fake(ends=Ended("failed", error))
    with client.websocket_connect("/ws?clientId=one") as socket:
        identity = _queue(client, graph)
        frames = _to_the_end(socket)
    (told,) = [frame["data"] for frame in frames if frame["type"] == "execution_error"]
    assert told["exception_message"] == message
    assert (told["traceback"], told["current_inputs"], told["node_id"]) == ([], {}, "8")
    entry = client.get("/history").json()[identity]
    assert entry["status"]["status_str"] == "error"
    assert entry["status"]["messages"][-1][0] == "execution_error"
    assert frames[-2]["type"] == "status"


def test_a_full_queue_is_429_in_comfyuis_shape(fake: Fake, graph: Json) -> None:
    client, _ = fake(held=True, most=1)
    _queue(client, graph)
    answer = client.post("/prompt", json={"prompt": graph})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
    assert answer.json()["error"]["type"] == "queue_full"
    assert answer.json()["node_errors"] == {}
    assert client.get("/prompt").json()["exec_info"]["queue_remaining"] == 1


def _previewed(client: TestClient, desk: Any, graph: Json, *, flag: bool, **more: Any) -> list[bytes]:
    """Queue a graph on a desk that gives estimates where they are wanted; return the binary frames."""

    found: list[bytes] = []

    async def draw(ticket: Ticket) -> None:
        estimate = np.zeros((1, 4, 8, 8), np.float32) if ticket.order.wants_estimates else None
        ticket.tell(Stepped("base", 1, 1, 0, estimate, "3"))
        while estimate is not None and not found:  # a job that has ended keeps no estimates
            await asyncio.sleep(0.001)
        ticket.tell(Drawn(0, desk.picture, "9"))
        ticket.tell(Ended("done"))

    desk._draw = draw
    with client.websocket_connect("/ws?clientId=one") as socket:
        if flag:
            socket.send_text(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))
            socket.receive_json()
            assert socket.receive_json()["type"] == "feature_flags"
        _queue(client, graph, **more)
        while True:
            message = socket.receive()
            if message.get("bytes"):
                found.append(message["bytes"])
            elif '"node": null' in message["text"]:
                return found


def test_previews_are_sent_to_those_only_who_ask(fake: Fake, graph: Json) -> None:
    client, desk = fake()
    assert _previewed(client, desk, graph, flag=False) == []
    (plain,) = _previewed(client, desk, graph, flag=False, extra_data={"preview_method": "auto"})
    assert struct.unpack(">II", plain[:8]) == (1, 1)
    assert plain[8:10] == b"\xff\xd8"
    (described,) = _previewed(client, desk, graph, flag=True)
    kind, length = struct.unpack(">II", described[:8])
    about = json.loads(described[8 : 8 + length])
    assert (kind, about["node_id"], about["image_type"]) == (4, "3", "image/jpeg")
    assert described[8 + length :][:2] == b"\xff\xd8"


def test_the_same_id_again_is_409_and_a_strange_one_400(fake: Fake, graph: Json) -> None:
    client, _ = fake(held=True)
    identity = "0a4d6d5e-1c1f-4a53-9b1e-3a7f8c0f2b11"
    assert _queue(client, graph, prompt_id=identity) == identity
    assert client.post("/prompt", json={"prompt": graph, "prompt_id": identity}).status_code == 409
    for strange in (identity.upper(), "x", 3, identity.replace("-", "")):
        answer = client.post("/prompt", json={"prompt": graph, "prompt_id": strange})
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_prompt_id")
