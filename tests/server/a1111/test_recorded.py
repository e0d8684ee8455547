"""What real clients sent, sent again as it is: each finds in the answer what its recording, or its source, reads."""

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from PIL import Image


def _ok(answer: httpx.Response) -> None:
    assert answer.status_code == 200, answer.text


def _drawn(answer: httpx.Response) -> dict[str, Any]:
    """What webuiapi, Open WebUI and SillyTavern read: exactly 200, plain base64 of a picture, `info` as JSON text."""
    _ok(answer)
    body = answer.json()
    assert body.keys() == {"images", "parameters", "info"}
    for image in body["images"]:
        assert not image.startswith("data:")
        Image.open(io.BytesIO(base64.b64decode(image, validate=True))).load()
    assert len(body["images"]) == 1
    facts: dict[str, Any] = json.loads(body["info"])
    return facts


def _librechat(answer: httpx.Response) -> None:
    facts = _drawn(answer)
    assert (facts["width"], facts["height"]) == (64, 64)
    assert isinstance(facts["seed"], int)
    last = facts["infotexts"][0].split("\n")[-1]
    assert last.startswith("Steps: 2, Sampler: Euler, ")
    assert f"Seed: {facts['seed']}" in last


def _options(answer: httpx.Response) -> None:
    """Open WebUI's KeyError, and what SillyTavern takes for Forge."""
    _ok(answer)
    assert answer.json()["sd_model_checkpoint"]
    assert "forge_preset" not in answer.json()


def _titles(answer: httpx.Response) -> None:
    _ok(answer)
    assert [each["model_name"] for each in answer.json()] == ["base", "refiner"]
    assert all(each["title"].endswith(f"[{each['hash']}]") and "/" not in each["filename"] for each in answer.json())


def _upscalers(answer: httpx.Response) -> None:
    """SillyTavern splices other upscalers in after the first."""
    assert [each["name"] for each in answer.json()] == ["None"]


def _names(*expected: str) -> Callable[[httpx.Response], None]:
    def check(answer: httpx.Response) -> None:
        assert {each["name"] for each in answer.json()} >= set(expected)

    return check


def _nothing(answer: httpx.Response) -> None:
    assert answer.json() == []


def _scripts(answer: httpx.Response) -> None:
    assert answer.json() == {"txt2img": [], "img2img": []}


def _idle(answer: httpx.Response) -> None:
    """SillyTavern and webuiapi wait for exactly this after they chose a model."""
    told = answer.json()
    assert (told["progress"], told["state"]["job_count"]) == (0.0, 0)


EXPECTED: dict[str, list[Callable[[httpx.Response], Any]]] = {
    "webuiapi-txt2img": [_scripts, _drawn],
    "webuiapi-img2img": [_drawn],
    "open-webui-automatic1111": [_options, _ok, _titles, _drawn],
    "librechat-a1111": [_librechat],
    "sillytavern-a1111": [_options, _upscalers, _nothing, _nothing, _names("Euler a", "DPM++ 2M", "DDIM"),
                          _names("karras", "automatic"), _titles, _ok, _idle, _drawn, _ok],
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_recorded_client_is_answered(fake: Callable[..., Any], replay: Any, name: str) -> None:
    client, _ = fake()
    title = client.get("/sdapi/v1/options").json()["sd_model_checkpoint"]
    fill = replay.Fill(fields={"width": 64, "height": 64, "steps": 2, "sd_model_checkpoint": title})
    for call, check in zip(replay.calls(name, fill), EXPECTED[name], strict=True):
        headers = [(key, value) for key, value in call.headers if key.lower() != "host"]
        check(client.request(call.method, call.path, params=call.query or None, headers=headers, content=call.content))


def test_every_recording_of_this_api_is_expected(replay: Any) -> None:
    """A new recording of /sdapi that nobody expects anything of would be sent by no test."""
    paths = {path.stem: [step.get("path", "") for step in replay.recording(path.stem)["exchange"]]
             for path in replay.CLIENTS.glob("*.json")}  # fmt: skip
    assert {name for name, used in paths.items() if any("/sdapi/" in each for each in used)} == EXPECTED.keys()


def test_another_title_of_open_webui_is_not_found(fake: Callable[..., Any]) -> None:
    client, _ = fake()
    answer = client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "other"})
    assert answer.status_code == 404
    assert answer.json().keys() == {"error", "detail", "body", "errors"}
