"""What real clients sent, sent again as it is: each finds in the answer what its recording, or its source, reads."""

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from PIL import Image

from sdxl_trt.server import Options

OPTIONS = Options(aliases=("m", "sdxl-base-refiner"))
LITELLM = {"model": "m", "response_format": "url", "user": "u1", "<provider params>": {"seed": 7, "steps": 20}}
"""Its body is described in words: a caller that asks for a url, and for two settings of this server."""
LITELLM_PARTS = [
    (['Content-Disposition: form-data; name="model"'], "m"),
    (['Content-Disposition: form-data; name="prompt"'], "a red fox"),
    (['Content-Disposition: form-data; name="n"'], "1"),
    (['Content-Disposition: form-data; name="image[]"'], "[<_io.BytesIO object at 0x7f3a>]"),
    (['Content-Disposition: form-data; name="image[]"; filename="image.png"', "Content-Type: image/png"], ...),
]


def _base64(answer: httpx.Response) -> list[str]:
    """What openai-python, Open WebUI and LibreChat read."""
    assert answer.status_code == 200, answer.text
    assert "json" in answer.headers["content-type"]
    body = answer.json()
    assert isinstance(body["created"], int)
    for each in body["data"]:
        Image.open(io.BytesIO(base64.b64decode(each["b64_json"]))).load()
    return [each.get("url") for each in body["data"]]


def _urls(answer: httpx.Response) -> None:
    """What LangChain reads, by joining them; a null is its TypeError."""
    assert answer.status_code == 200, answer.text
    assert "\n".join(each["url"] for each in answer.json()["data"]).startswith("http")


def _no_url(answer: httpx.Response) -> None:
    """A client that prefers a url and may be unable to fetch it must not find one."""
    assert _base64(answer) == [None]


def _models(answer: httpx.Response) -> None:
    listed = answer.json()
    assert listed["object"] == "list"
    assert all(each.keys() >= {"id", "object", "created", "owned_by"} for each in listed["data"])


def _stream(answer: httpx.Response) -> None:
    """What both SDKs do: the kind is the data's `type`, and a stream without `completed` raises nothing."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    data = [json.loads(line[6:]) for line in answer.text.split("\n") if line.startswith("data: ")]
    assert data[-1]["type"].endswith(".completed")
    assert data[-1].keys() >= {"b64_json", "created_at", "size", "quality", "background", "output_format", "usage"}
    partial = {"b64_json", "partial_image_index", "created_at", "size", "quality", "background", "output_format"}
    assert all(each.keys() >= partial for each in data[:-1])
    assert len(data) > 1


def _two_pictures(answer: httpx.Response) -> None:
    """More than upstream's one picture to edit is the one thing that is refused here, by name."""
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "image")


EXPECTED: dict[str, list[Callable[[httpx.Response], Any]]] = {
    "openai-python-generate": [_base64, _base64, _models],
    "openai-python-stream": [_stream],
    "openai-python-edit": [_base64, _two_pictures, _stream],
    "open-webui-openai": [_no_url, _no_url],
    "langchain-dalle": [_urls, _base64],
    "litellm-generate": [_urls],
    "litellm-edit": [_base64],
}


def _fill(replay: Any, name: str) -> Any:
    parts = [(headers, replay.picture() if data is ... else data) for headers, data in LITELLM_PARTS]
    return replay.Fill(fields=LITELLM if name == "litellm-generate" else {}, parts=parts if "litellm" in name else ())


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_recorded_client_is_answered(served: Callable[..., Any], replay: Any, name: str) -> None:
    async def use(client: httpx.AsyncClient, _: Any) -> list[httpx.Response]:
        sent = replay.calls(name, _fill(replay, name))
        return [await client.send(call.request("http://127.0.0.1:8188")) for call in sent]

    answers = served(use, OPTIONS)
    for check, answer in zip(EXPECTED[name], answers, strict=True):
        check(answer)


def test_every_recording_of_this_api_is_expected(replay: Any) -> None:
    """A new recording of /v1 that nobody expects anything of would be sent by no test."""
    paths = {path.stem: [step.get("path", "") for step in replay.recording(path.stem)["exchange"]]
             for path in replay.CLIENTS.glob("*.json")}  # fmt: skip
    assert {name for name, used in paths.items() if any("/v1/images" in each for each in used)} == EXPECTED.keys()
