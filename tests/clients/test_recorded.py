"""What the openai package sent is sent again to the server, and the package's own types parse each answer strictly."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types import (
    ImageEditCompletedEvent,
    ImageEditPartialImageEvent,
    ImageGenCompletedEvent,
    ImageGenPartialImageEvent,
    ImagesResponse,
    Model,
)

EVENTS: dict[str, Any] = {
    "image_generation.partial_image": ImageGenPartialImageEvent,
    "image_generation.completed": ImageGenCompletedEvent,
    "image_edit.partial_image": ImageEditPartialImageEvent,
    "image_edit.completed": ImageEditCompletedEvent,
}


@pytest.fixture(scope="module")
def replay() -> Any:
    file = Path(__file__).parents[1] / "server" / "replay.py"
    spec = importlib.util.spec_from_file_location("replay", file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["replay"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _pictures(answer: httpx.Response) -> None:
    parsed = ImagesResponse.model_validate(answer.json(), strict=True)
    assert parsed.data
    assert all(each.b64_json or each.url for each in parsed.data)


def _models(answer: httpx.Response) -> None:
    assert [Model.model_validate(each, strict=True) for each in answer.json()["data"]]


def _events(answer: httpx.Response) -> None:
    data = [json.loads(line[6:]) for line in answer.text.split("\n") if line.startswith("data: ")]
    assert [EVENTS[each["type"]].model_validate(each, strict=True) for each in data]
    assert data[-1]["type"].endswith("completed")


def _refused(answer: httpx.Response) -> None:
    assert answer.status_code == 400
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("name", "checks"),
    [
        ("openai-python-generate", [_pictures, _pictures, _models]),
        ("openai-python-stream", [_events]),
        ("openai-python-edit", [_pictures, _refused, _events]),
        ("open-webui-openai", [_pictures, _pictures]),
        ("langchain-dalle", [_pictures, _pictures]),
    ],
)
def test_the_packages_types_parse_every_answer(
    server: str, replay: Any, name: str, checks: list[Callable[..., None]]
) -> None:
    fill = replay.Fill(fields={"model": "gpt-image-1", "size": "64x64", "steps": 2})
    with httpx.Client(timeout=60) as client:
        for call, check in zip(replay.calls(name, fill), checks, strict=True):
            check(client.send(call.request(server)))
