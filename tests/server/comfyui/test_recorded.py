"""Recorded requests of real clients, and what each reads from the answers."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from sdxl_trt.server import Options

Json = dict[str, Any]
Fake = Callable[..., tuple[TestClient, Any]]


def _wait(client: TestClient) -> None:
    while client.get("/prompt").json()["exec_info"]["queue_remaining"]:
        pass


def _sent(client: TestClient, call: Any) -> Any:
    query = f"?{call.query}" if call.query else ""
    return client.request(call.method, call.path + query, headers=dict(call.headers), content=call.content)


def test_comfy_api_simplified_draws(fake: Fake, graph: Json, replay: Any) -> None:
    client, desk = fake(Options(), held=True)
    prompt, *views = replay.calls("comfy-api-simplified-draw", replay.Fill(graph=graph))
    answer = _sent(client, prompt)
    assert answer.status_code == 200
    identity = answer.json()["prompt_id"]
    (handshake,) = replay.handshakes("comfy-api-simplified-draw")
    with client.websocket_connect(f"{handshake.path}?{handshake.query}") as socket:
        first = socket.receive_json()
        desk.held = False
        frames = [first]
        while True:  # as its source: until nothing remains
            frame = socket.receive()
            assert "bytes" not in frame, "it takes every binary frame for a picture"
            frames.append(json.loads(frame["text"]))
            if frames[-1]["type"] == "status" and not _remaining(frames[-1]):
                break
        ours = {frame["type"] for frame in frames}
        assert {kind for kind, _ in replay.frames("comfy-api-simplified-draw")} - {"executing"} <= ours | {
            "execution_start", "execution_cached"}  # fmt: skip
    for call in views:
        path = call.path.replace(call.path.rpartition("/")[2], identity) if "/history/" in call.path else call.path
        answer = client.get(path + (f"?{call.query}" if call.query else ""), headers=dict(call.headers))
        assert answer.status_code == 200, (path, call.query)
        if "/history" in path:
            named = answer.json()[identity]["outputs"]["9"]["images"][0]
            assert named.keys() == {"filename", "subfolder", "type"}
        else:
            assert answer.content.startswith(b"\x89PNG")


def _remaining(frame: Json) -> int:
    return int(frame["data"]["status"]["exec_info"]["queue_remaining"])


def test_comfy_api_simplified_uploads_and_interrupts(fake: Fake, replay: Any) -> None:
    client, _ = fake(Options())
    upload, interrupt = replay.calls("comfy-api-simplified-upload")
    answer = _sent(client, upload)
    assert answer.status_code == 200, answer.text
    assert answer.json() == {"name": "cat.png", "subfolder": "default_upload_folder", "type": "input"}
    assert _sent(client, interrupt).status_code == 200
    (handshake,) = replay.handshakes("comfy-api-simplified-upload")
    with client.websocket_connect(f"{handshake.path}?{handshake.query}") as socket:
        assert socket.receive_json()["type"] == "status"


def test_comfy_api_client_draws(fake: Fake, graph: Json, replay: Any) -> None:
    client, _ = fake(Options())
    identity = ""
    for call in replay.calls("comfy-api-client-draw", replay.Fill(graph=graph)):
        if "/history/" in call.path:
            answer = client.get(f"/history/{identity}", headers=dict(call.headers))
        else:
            answer = _sent(client, call)
        assert answer.status_code == 200, (call.path, answer.text)
        if call.path == "/prompt":
            identity = answer.json()["prompt_id"]
            _wait(client)
        elif call.path == "/history":
            for item in answer.json().values():
                assert item["status"]["status_str"] in ("success", "error")
                _, _, _, _, _ = item["prompt"]
        elif call.path == "/view":
            cut = answer.headers["content-disposition"].split("=", 1)[1].strip('"')
            assert cut == "ComfyUI_00001_.png"
            assert answer.content.startswith(b"\x89PNG")
        elif call.path == "/queue":
            assert answer.json() == {"queue_running": [], "queue_pending": []}
        elif call.path == "/upload/image":
            assert answer.json()["name"] == "cat.png"


def test_sillytavern_draws(fake: Fake, graph: Json, replay: Any) -> None:
    client, _ = fake(Options())
    identity = ""
    fill = replay.Fill(graph=graph, words={"filename=<raw>&subfolder=<raw>&type=<raw>": "x=1"})
    for call in replay.calls("sillytavern-comfyui", fill):
        if call.path == "/view":
            named = client.get("/history").json()[identity]["outputs"]["9"]["images"][0]
            query = f"filename={named['filename']}&subfolder={named['subfolder']}&type={named['type']}"
            answer = client.get(f"/view?{query}")
            assert answer.content.startswith(b"\x89PNG")
            continue
        answer = _sent(client, call)
        assert answer.status_code == 200, (call.path, answer.text)
        if call.path == "/object_info":
            info = answer.json()
            for kind, name in (("KSampler", "sampler_name"), ("KSampler", "scheduler"), ("UNETLoader", "unet_name"),
                               ("CheckpointLoaderSimple", "ckpt_name"), ("VAELoader", "vae_name")):  # fmt: skip
                assert isinstance(info[kind]["input"]["required"][name][0], list)
        elif call.path == "/prompt":
            identity = answer.json()["prompt_id"]
            _wait(client)
        elif call.path == "/history":
            assert answer.json()[identity]["outputs"]["9"]["images"][0]["type"] == "output"


def test_a_text_body_with_a_wrong_graph_is_shown_as_text(fake: Fake, replay: Any) -> None:
    client, _ = fake(Options())
    fill = replay.Fill(graph={"1": {"class_type": "Unknown", "inputs": {}}}, words={"<raw>": "x"})
    (call,) = [call for call in replay.calls("sillytavern-comfyui", fill) if call.path == "/prompt"]
    answer = _sent(client, call)
    assert answer.status_code == 400
    assert "Unknown" in answer.text


@pytest.mark.parametrize("path", ["/prompt", "/queue", "/history", "/object_info", "/system_stats", "/features",
                                  "/embeddings", "/extensions", "/models"])  # fmt: skip
def test_every_route_is_also_under_api(fake: Fake, path: str) -> None:
    client, _ = fake(Options())
    first, second = client.get(path), client.get(f"/api{path}")
    assert (first.status_code, second.status_code) == (200, 200)
    if path != "/system_stats":
        assert first.json() == second.json()
