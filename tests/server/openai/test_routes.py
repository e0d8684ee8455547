"""The routes of /v1, on a desk that draws at once."""

import asyncio
import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from PIL import Image

from sdxl_trt.engines import ResourceError
from sdxl_trt.runtime import Request
from sdxl_trt.server import Options
from sdxl_trt.server.desk import Desk, Ended
from sdxl_trt.server.refusals import QueueFull

FOX = {"prompt": "a red fox", "size": "64x64"}
URL = "/v1/images/generations"
Served = Callable[..., Any]


def _picture(mode: str = "RGB", colour: Any = (200, 40, 40), size: tuple[int, int] = (64, 64)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def _opened(data: dict[str, str]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data["b64_json"])))


def _events(answer: httpx.Response) -> list[tuple[str, Any]]:
    """Return the events of a stream; comments are left out."""
    blocks = [block for block in answer.text.split("\n\n") if block and not block.startswith(":")]
    parsed = [dict(line.split(": ", 1) for line in block.split("\n")) for block in blocks]
    return [(each["event"], json.loads(each["data"])) for each in parsed]


def _post(body: Any, url: str = URL, **more: Any) -> Callable[..., Any]:
    async def use(client: httpx.AsyncClient, desk: Any) -> tuple[httpx.Response, Any]:
        return await client.post(url, json=body, **more), desk

    return use


def _edit(fields: dict[str, Any], files: Any) -> Callable[..., Any]:
    async def use(client: httpx.AsyncClient, desk: Any) -> tuple[httpx.Response, Any]:
        return await client.post("/v1/images/edits", data=fields, files=files), desk

    return use


def test_an_answer_has_what_the_sdks_read(served: Served) -> None:
    answer, desk = served(_post(FOX | {"n": 2, "seed": 7, "negative_prompt": "blur"}))
    body = answer.json()
    assert answer.status_code == 200
    assert isinstance(body["created"], int)
    assert [_opened(each).size for each in body["data"]] == [(64, 64), (64, 64)]
    assert {key: body[key] for key in ("size", "quality", "background", "output_format", "seeds", "warnings")} == {
        "size": "64x64", "quality": "medium", "background": "opaque", "output_format": "png", "seeds": [7, 8],
        "warnings": [],
    }  # fmt: skip
    assert body["usage"] == {"input_tokens": 4, "output_tokens": 0, "total_tokens": 4,
                             "input_tokens_details": {"image_tokens": 0, "text_tokens": 4}}  # fmt: skip
    (order,) = desk.orders
    assert (order.api, order.who, order.wants_estimates, order.deadline) == ("openai", "peer:test", False, 600.0)
    assert json.loads(_opened(body["data"][0]).text["sdxl-trt"])["prompt"] == "a red fox"  # type: ignore[attr-defined]


@pytest.mark.parametrize(("kind", "format_"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_pictures_have_the_format_that_was_asked_for(served: Served, kind: str, format_: str) -> None:
    sizes = []
    for compression in (0, 100):
        answer, _ = served(_post(FOX | {"output_format": kind, "output_compression": compression, "seed": 7}))
        picture = _opened(answer.json()["data"][0])
        assert picture.format == format_
        picture.load()
        sizes.append(len(answer.content))
    assert (sizes[0] == sizes[1]) == (kind == "png"), "a PNG is the same at any compression"
    assert answer.json()["output_format"] == kind


def test_a_url_is_fetched_with_its_type_and_no_other_is_there(served: Served) -> None:
    async def use(client: httpx.AsyncClient, _: Any) -> tuple[Any, ...]:
        body = (await client.post(URL, json=FOX | {"model": "dall-e-3", "output_format": "webp"})).json()
        return body["data"][0], await client.get(body["data"][0]["url"]), await client.get("/v1/files/0123.webp")

    data, file, none = served(use)
    assert data.keys() == {"b64_json", "url"}
    assert data["url"].startswith("http://127.0.0.1:8188/v1/files/")
    assert (file.headers["content-type"], file.headers["x-content-type-options"]) == ("image/webp", "nosniff")
    assert file.content == base64.b64decode(data["b64_json"])
    assert none.status_code == 404


def test_a_stream_tells_partial_images_then_the_picture_one_picture_after_the_other(served: Served) -> None:
    answer, desk = served(
        _post(FOX | {"stream": True, "partial_images": 3, "n": 2, "steps": 10, "seed": 7, "handoff": 0.4})
    )
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-cache", "no")
    assert desk.orders[0].wants_estimates
    events = _events(answer)
    assert [name.removeprefix("image_generation.") for name, _ in events] == [*["partial_image"] * 3, "completed"] * 2
    assert all(data["type"] == name for name, data in events)
    partials = [data for name, data in events if "partial" in name]
    assert [(each["image_index"], each["partial_image_index"], each["step"], each["steps"]) for each in partials] == [
        (0, 0, 3, 10), (0, 1, 5, 10), (0, 2, 8, 10), (1, 0, 3, 10), (1, 1, 5, 10), (1, 2, 8, 10),
    ]  # fmt: skip
    assert [each["stage"] for each in partials[:3]] == ["base", "refiner", "refiner"]
    assert {_opened(data).size for _, data in events} == {(64, 64)}
    last = events[-1][1]
    assert (last["seed"], last["size"], last["output_format"]) == (8, "64x64", "png")
    assert last["usage"]["total_tokens"] == 3
    assert ": waiting " in answer.text
    assert ': step {"stage": "base", "index": 1, "total": ' in answer.text


@pytest.mark.parametrize(("partials", "steps", "shown"), [(0, 8, 0), (3, 2, 1), (3, 1, 0), (1, 2, 1)])
def test_a_short_run_shows_fewer_partial_images(served: Served, partials: int, steps: int, shown: int) -> None:
    answer, _ = served(_post(FOX | {"stream": True, "partial_images": partials, "steps": steps}))
    indices = [data["partial_image_index"] for name, data in _events(answer) if "partial" in name]
    assert indices == [*range(shown)]


@pytest.mark.parametrize(
    ("ended", "status", "code"),
    [
        (Ended("deadline"), 504, "deadline_exceeded"),
        (Ended("failed", ResourceError("at /secret")), 500, "out_of_memory"),
        (Ended("failed", RuntimeError("at /secret")), 500, "internal_error"),
        (Ended("cancelled"), 503, "cancelled"),
    ],
)
def test_a_failure_is_a_status_or_the_last_event(
    served: Served, desk_of: Any, ended: Ended, status: int, code: str
) -> None:
    plain, _ = served(_post(FOX), make_desk=lambda: desk_of(fails=ended))
    assert (plain.status_code, plain.json()["error"]["code"]) == (status, code)
    assert plain.headers.get("x-should-retry") == ("false" if status in (500, 504) else None)
    streamed, _ = served(_post(FOX | {"stream": True, "n": 2}), make_desk=lambda: desk_of(fails=ended))
    events = _events(streamed)
    assert streamed.status_code == 200
    assert [name for name, _ in events] == ["image_generation.completed", "error"]
    assert events[-1][1] == plain.json()
    assert events[-1][1]["error"]["type"] == "server_error"
    assert "/secret" not in plain.text + streamed.text


def test_an_interrupted_request_answers_the_pictures_so_far(served: Served, desk_of: Any) -> None:
    answer, _ = served(_post(FOX | {"n": 2, "seed": 1}), make_desk=lambda: desk_of(fails=Ended("interrupted")))
    assert answer.json()["seeds"] == [1]
    assert "interrupted" in answer.json()["warnings"][0]
    none, _ = served(_post(FOX), make_desk=lambda: desk_of(fails=Ended("interrupted")))
    assert (none.status_code, none.headers["x-should-retry"]) == (503, "false")


def test_a_full_queue_is_told_before_a_stream_begins(served: Served, desk_of: Any) -> None:
    for body in (FOX, FOX | {"stream": True}):
        answer, _ = served(_post(body), make_desk=lambda: desk_of(refuses=QueueFull("full", 7)))
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
        assert answer.json()["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize(
    ("told", "deadline"),
    [({"x-stainless-read-timeout": "20"}, 20.0), ({"X-Request-Timeout-Seconds": "0.5", "x-stainless-read-timeout": "9"},
     0.5), ({"X-Request-Timeout-Seconds": "0"}, 600.0), ({"X-Request-Timeout-Seconds": "1e9"}, 600.0),
     ({"x-stainless-read-timeout": "nan"}, 600.0), ({"x-stainless-read-timeout": "not given"}, 600.0)],
)  # fmt: skip
def test_a_header_may_only_shorten_the_deadline(served: Served, told: dict[str, str], deadline: float) -> None:
    _, desk = served(_post(FOX, headers=told))
    assert desk.orders[0].deadline == deadline


def test_a_client_that_may_come_again_sets_no_deadline_by_leaving(served: Served) -> None:
    told = {"x-stainless-read-timeout": "20"}
    assert served(_post(FOX, headers=told), Options(on_disconnect="finish"))[1].orders[0].deadline == 600.0


def test_an_edit_takes_one_picture_and_a_mask(served: Served) -> None:
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 32, 64))
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    files = [("image[]", ("a.png", _picture(), "image/png")), ("mask", ("m.png", buffer.getvalue(), "image/png"))]
    answer, desk = served(_edit({"prompt": "a fox", "seed": "7", "steps": "2", "input_fidelity": "high"}, files))
    assert answer.status_code == 200, answer.text
    work = desk.orders[0].work
    assert isinstance(work, Request)
    assert work.image.shape == (64, 64, 3)  # type: ignore[union-attr]
    assert work.mask[:, :32].min() == 255  # type: ignore[index]
    assert work.mask[:, 32:].max() == 0  # type: ignore[index]
    assert (work.strength, work.seed, work.steps) == (None, 7, 2)
    streamed, _ = served(_edit({"prompt": "a fox", "stream": "true", "partial_images": "1"}, files))
    assert [name for name, _ in _events(streamed)] == ["image_edit.partial_image", "image_edit.completed"]


def test_an_edit_drops_a_text_with_the_name_of_a_file(served: Served) -> None:
    fields = {"prompt": "a fox", "image[]": "<_io.BytesIO object at 0x7f>", "mask": "<_io.BytesIO object>"}
    answer, _ = served(_edit(fields, [("image[]", ("image.png", _picture(), "image/png"))]))
    assert answer.status_code == 200
    assert [text.split(":")[0] for text in answer.json()["warnings"]] == ["image[]", "mask"]


@pytest.mark.parametrize(
    ("fields", "files", "param", "code"),
    [
        ({"prompt": "p"}, [("image[]", _picture()), ("image[]", _picture())], "image", "invalid_image"),
        ({"prompt": "p"}, [("mask", _picture())], "image", "invalid_image"),
        ({"prompt": "p"}, [("image", b"GIF89a")], "image", "invalid_image"),
        ({"prompt": "p"}, [("image", _picture()), ("mask", _picture())], "mask", "invalid_image"),
        ({"prompt": "p"}, [("image", _picture()), ("other", _picture())], "other", "invalid_value"),
        ({"prompt": ["p", "q"]}, [("image", _picture())], "prompt", "invalid_value"),
        ({"prompt": "p", "size": "65x64"}, [("image", _picture())], "size", "invalid_value"),
        ({"prompt": "p", "strength": "0.01", "steps": "3"}, [("image", _picture())], "strength", "invalid_value"),
        ({}, [("image", _picture())], "prompt", "missing_required_parameter"),
    ],
)
def test_a_wrong_edit_names_the_part(served: Served, fields: Any, files: Any, param: str, code: str) -> None:
    named = [(name, ("a.png", data, "image/png")) for name, data in files]
    answer, desk = served(_edit(fields, named))
    assert (answer.status_code, answer.json()["error"]["param"], answer.json()["error"]["code"]) == (400, param, code)
    assert desk.orders == []


def test_what_is_not_there_is_said_by_name(served: Served) -> None:
    async def use(client: httpx.AsyncClient, _: Any) -> list[tuple[int, Any]]:
        answers = [
            await client.post("/v1/images/variations", files={"image": _picture()}),
            await client.post("/v1/images/edits", json=FOX),
            await client.post(URL, json=FOX | {"model": "flux"}),
            await client.get("/v1/models/flux"),
        ]
        return [(answer.status_code, answer.json()["error"]["code"]) for answer in answers]

    assert served(use) == [(404, "not_found"), (415, "unsupported_media"), (404, "model_not_found"),
                           (404, "model_not_found")]  # fmt: skip


def test_models_are_the_bundle_and_its_aliases(served: Served, tmp_path: Path) -> None:
    async def use(client: httpx.AsyncClient, desk: Any) -> tuple[Any, Any]:
        desk.pipeline.pool.bundle = SimpleNamespace(root=tmp_path / "my-bundle")
        return (await client.get("/v1/models")).json(), (await client.get("/v1/models/sd/xl")).json()

    listed, found = served(use, Options(engines=tmp_path / "current", aliases=("sd/xl", "team-*")))
    assert listed["object"] == "list"
    assert [each["id"] for each in listed["data"]] == ["my-bundle", "sd/xl", "gpt-image-1", "dall-e-3", "dall-e-2"]
    assert found == listed["data"][1]
    assert found.keys() == {"id", "object", "created", "owned_by"}
    answer, _ = served(_post(FOX | {"model": "team-a"}), Options(aliases=("team-*",)))
    assert answer.status_code == 200


def test_loras_are_found_by_name_in_the_servers_folder_alone(served: Served, tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    (folder / "styles").mkdir(parents=True)
    (tmp_path / "outside.safetensors").write_bytes(b"")
    options = Options(lora_dir=folder)
    for name in ("none", "../outside", str(tmp_path / "outside.safetensors"), "styles", "\0", "a" * 300):
        answer, _ = served(_post(FOX | {"loras": [name]}), options)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "loras")
        assert str(tmp_path) not in answer.text
    answer, _ = served(_post(FOX | {"prompt": "a <lora:none:1> fox"}), options)
    assert answer.status_code == 400
    assert str(tmp_path) not in answer.text
    answer, _ = served(_post(FOX | {"loras": ["a"]}))
    assert "--lora-dir" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("policy", "started", "stopped"),
    [
        (None, True, True),
        ("finish", True, False),
        ("finish-if-started", True, False),
        ("finish-if-started", False, True),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_order_as_the_policy_says(
    desk_of: Any, policy: Any, started: bool, stopped: bool, stream: bool
) -> None:
    """Over ASGI by hand: the client leaves as soon as its order is at the desk."""
    from sdxl_trt.server.desk import Stepped

    async def main() -> Any:
        conftest = desk_of.__globals__
        desk = desk_of(hold=asyncio.Event())
        app = conftest["_application"](desk, Options(on_disconnect=policy))
        body = json.dumps(FOX | {"stream": stream}).encode()
        messages: asyncio.Queue[Any] = asyncio.Queue()
        messages.put_nowait({"type": "http.request", "body": body, "more_body": False})
        scope = {"type": "http", "method": "POST", "path": URL, "raw_path": URL.encode(), "query_string": b"",
                 "headers": [(b"host", b"127.0.0.1:8188")], "http_version": "1.1", "scheme": "http", "root_path": "",
                 "server": ("127.0.0.1", 8188), "client": ("127.0.0.1", 1), "asgi": {"version": "3.0"}}  # fmt: skip

        async def send(_: Any) -> None: ...

        call = asyncio.create_task(app(scope, messages.get, send))
        while not desk.tickets:
            await asyncio.sleep(0)
        if started:
            desk.tickets[0].tell(Stepped("base", 1, 2))
            while desk.tickets[0].started is None:
                await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
        messages.put_nowait({"type": "http.disconnect"})
        messages.put_nowait({"type": "http.disconnect"})
        while stopped and desk.tickets[0].stop is None:
            await asyncio.sleep(0)
        desk.hold.set()
        await asyncio.wait_for(call, 5)
        return desk.tickets[0].stop

    assert asyncio.run(asyncio.wait_for(main(), 30)) == ("cancelled" if stopped else None)


def test_the_embedded_pair_draws_what_its_pipeline_draws(served: Served, pipeline: Any) -> None:
    """On the real desk: the same pixels as the library's, by stream and by answer, whole and with partial images."""
    body = {"prompt": "a red star", "size": "64x64", "steps": 4, "seed": 7, "n": 2}

    async def use(client: httpx.AsyncClient, desk: Desk) -> tuple[Any, ...]:
        try:
            answer = await client.post(URL, json=body)
            return answer, await client.post(URL, json=body | {"stream": True, "partial_images": 2})
        finally:
            await asyncio.to_thread(desk.close)

    answer, streamed = served(use, make_desk=lambda: Desk(pipeline, Options()))
    request = Request("a red star", width=64, height=64, steps=4, seed=7, count=2)
    expected = [picture.image.tobytes() for picture in pipeline.generate(request)]
    assert [_opened(each).tobytes() for each in answer.json()["data"]] == expected
    events = _events(streamed)
    assert [name.removeprefix("image_generation.") for name, _ in events] == [*["partial_image"] * 2, "completed"] * 2
    assert [_opened(data).tobytes() for name, data in events if "completed" in name] == expected
    assert answer.json()["seeds"] == [7, 8]


def test_a_repeated_request_has_the_same_answer(served: Callable[..., Any]) -> None:
    async def use(client: httpx.AsyncClient, desk: Any) -> None:
        retry = {"x-stainless-retry-count": "1"}
        key = {"Idempotency-Key": "k"}
        first, again = [await client.post(URL, json=FOX, headers=key) for _ in range(2)]
        assert len(desk.orders) == 1
        assert first.content == again.content
        assert "idempotent-replayed" not in first.headers
        assert again.headers["idempotent-replayed"] == "true"
        streamed = await client.post(URL, json=FOX | {"stream": True}, headers={"Idempotency-Key": "s"})
        replayed = await client.post(URL, json=FOX | {"stream": True}, headers={"Idempotency-Key": "s"})
        assert (len(desk.orders), replayed.headers["idempotent-replayed"]) == (2, "true")
        assert streamed.text.count("event: ") == replayed.text.count("event: ") == 1
        retried = await client.post(URL, json=FOX | {"n": 1}, headers=retry)
        assert len(desk.orders) == 3
        assert (await client.post(URL, json=FOX | {"n": 1}, headers=retry)).content == retried.content
        assert (await client.post(URL, json=FOX | {"seed": 1}, headers=key)).status_code == 422
        assert len(desk.orders) == 3

    served(use)
