"""The ingress by HTTP: the APIs and the pixels of one box, a full queue, a client that leaves, a device that dies."""

import base64
import http.client
import io
import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlencode, urlsplit

import numpy as np
import pytest
from PIL import Image

Server = Any
ASKED = {"prompt": "a large red star", "size": "64x64", "steps": 4, "seed": 7, "handoff": 0.5}
GENERATE = "/v1/images/generations"


def _pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _drawn(answer: Any) -> list[np.ndarray]:
    return [_pixels(base64.b64decode(each["b64_json"])) for each in answer["data"]]


def _equal(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return len(one) == len(other) and all(map(np.array_equal, one, other))


def _events(server: Server, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the events of a stream; leaving it closes the connection."""
    connection = http.client.HTTPConnection(urlsplit(server.address).netloc, timeout=120)
    connection.request("POST", GENERATE, json.dumps({**body, "stream": True}))
    answer = connection.getresponse()
    try:
        assert answer.status == 200
        for line in answer:
            if line.startswith(b"data:"):
                yield json.loads(line[5:])
    finally:
        answer.close()
        connection.close()


@pytest.mark.parametrize(
    "changes",
    [{"n": 2}, {"handoff": None}, {"sampler": "dpmpp_2s_ancestral", "negative_prompt": "blur"},
     {"compat": "comfyui", "n": 2}],
    ids=["two pictures", "base alone", "a sampler with noise", "ComfyUI's noise"],
)  # fmt: skip
def test_openai_draws_the_pixels_of_one_box(ray_box: Server, one_box: Server, changes: dict[str, Any]) -> None:
    answers = [server.json(GENERATE, {**ASKED, **changes}) for server in (ray_box, one_box)]
    assert _equal(*map(_drawn, answers))
    assert answers[0]["seeds"] == answers[1]["seeds"]


def test_a_stream_shows_partial_pictures_and_ends_with_the_picture(ray_box: Server, one_box: Server) -> None:
    streams = [[*_events(server, {**ASKED, "partial_images": 2})] for server in (ray_box, one_box)]
    kinds = [[event["type"] for event in events] for events in streams]
    assert kinds[0] == kinds[1] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert _equal(*([_pixels(base64.b64decode(event["b64_json"])) for event in events] for events in streams))


def test_an_edit_starts_from_a_picture(ray_box: Server, one_box: Server) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (64, 64, 3), np.uint8)).save(buffer, "PNG")
    fields = {"prompt": "a star", "seed": "3", "steps": "6", "strength": "0.6", "size": "64x64"}
    parts = [f'--B\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
             for name, value in fields.items()]  # fmt: skip
    head = b'--B\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    body = b"".join([*parts, head, buffer.getvalue(), b"\r\n--B--\r\n"])
    answers = []
    for server in (ray_box, one_box):
        connection = http.client.HTTPConnection(urlsplit(server.address).netloc, timeout=120)
        connection.request("POST", "/v1/images/edits", body, {"Content-Type": "multipart/form-data; boundary=B"})
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        answers.append(_drawn(json.loads(answer.read())))
        connection.close()
    assert _equal(*answers)


def _graph(model: str) -> dict[str, Any]:
    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    return {
        "3": node("KSampler", seed=7, steps=3, cfg=7.0, sampler_name="euler", scheduler="normal", denoise=1.0,
                  model=["4", 0], positive=["6", 0], negative=["7", 0], latent_image=["5", 0]),
        "4": node("CheckpointLoaderSimple", ckpt_name=model),
        "5": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "6": node("CLIPTextEncode", text="a red star", clip=["4", 1]),
        "7": node("CLIPTextEncode", text="blur", clip=["4", 1]),
        "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "9": node("SaveImage", filename_prefix="ComfyUI", images=["8", 0]),
    }  # fmt: skip


def _by_comfyui(server: Server, kit: Any) -> list[np.ndarray]:
    info = server.json("/object_info/CheckpointLoaderSimple")
    model = info["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"][0][0]
    identity = server.json("/prompt", {"prompt": _graph(model)})["prompt_id"]
    kit.until(lambda: server.json(f"/history/{identity}"), "no history")
    entry = server.json(f"/history/{identity}")[identity]
    assert entry["status"]["status_str"] == "success", entry
    return [_pixels(server.ask(f"/view?{urlencode(image)}")[2]) for image in entry["outputs"]["9"]["images"]]


def test_comfyui_draws_the_pixels_of_one_box(ray_box: Server, one_box: Server, kit: Any) -> None:
    assert _equal(_by_comfyui(ray_box, kit), _by_comfyui(one_box, kit))


def test_automatic1111_draws_the_pixels_of_one_box(ray_box: Server, one_box: Server) -> None:
    if one_box.ask("/sdapi/v1/samplers")[0] == 404:
        pytest.skip("the server has no /sdapi")
    asked = {"prompt": "a red star", "width": 64, "height": 64, "steps": 4, "seed": 7, "sampler_name": "Euler"}
    answers = [server.json("/sdapi/v1/txt2img", asked)["images"] for server in (ray_box, one_box)]
    assert _equal(*([_pixels(base64.b64decode(each)) for each in images] for images in answers))


def test_an_answer_has_one_request_id(ray_box: Server) -> None:
    for given in ({}, {"X-Request-ID": "mine-1"}):
        connection = http.client.HTTPConnection(urlsplit(ray_box.address).netloc, timeout=60)
        connection.request("GET", "/v1/models", headers=given)
        answer = connection.getresponse()
        answer.read()
        found = [value for name, value in answer.getheaders() if name.lower() == "x-request-id"]
        connection.close()
        assert len(found) == 1
        assert not given or found == ["mine-1"]


def test_what_a_pool_refuses_is_an_answer_of_the_api(ray_box: Server) -> None:
    status, _, body = ray_box.ask(GENERATE, {**ASKED, "size": "72x64"})
    assert (status, json.loads(body)["error"]["type"]) == (400, "invalid_request_error")


def test_a_full_queue_refuses_and_says_when_to_come_back(ray_box: Server, one_box: Server) -> None:
    with ThreadPoolExecutor(20) as threads:
        answers = [*threads.map(lambda seed: ray_box.ask(GENERATE, {**ASKED, "steps": 8, "seed": seed}), range(20))]
    statuses = [status for status, _, _ in answers]
    assert {*statuses} == {200, 429}
    for status, headers, body in answers:
        if status == 429:
            assert 1 <= int(headers["retry-after"]) <= 120
            assert json.loads(body)["error"]["code"] == "queue_full"
    first = statuses.index(200)
    same = one_box.json(GENERATE, {**ASKED, "steps": 8, "seed": first})
    # In company other kernels may run: equal to rounding.
    drawn = _drawn(json.loads(answers[first][2]))[0].astype(int)
    assert np.abs(drawn - _drawn(same)[0].astype(int)).max() <= 2


def test_a_client_that_leaves_stops_the_device(ray_box: Server) -> None:
    long = {**ASKED, "steps": 600, "handoff": 0.99, "partial_images": 3}
    began = time.monotonic()
    events = _events(ray_box, {**long, "steps": 60})
    list(events)
    whole = time.monotonic() - began
    stream = _events(ray_box, long)  # ten times as many steps
    next(stream)
    stream.close()
    began = time.monotonic()
    ray_box.json(GENERATE, ASKED)
    assert time.monotonic() - began < 4 * whole


def test_a_device_that_dies_costs_no_picture(ray_box: Server, one_box: Server, kit: Any) -> None:
    asked = {**ASKED, "steps": 120, "partial_images": 3, "seed": 11}
    stream = _events(ray_box, asked)
    next(stream)
    os.kill(ray_box.replica("Base"), signal.SIGKILL)
    ended = [*stream][-1]
    assert ended["type"] == "image_generation.completed", ended
    expected = _drawn(one_box.json(GENERATE, {**ASKED, "steps": 120, "seed": 11}))
    assert _equal([_pixels(base64.b64decode(ended["b64_json"]))], expected)
    kit.until(lambda: ray_box.ask("/health/ready")[0] == 200, "not ready again")
