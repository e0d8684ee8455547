"""The replayer: recordings become whole requests, with nothing added and no stand-in left."""

import importlib.util
import json
import sys
from email.parser import BytesParser
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def replay() -> Any:
    spec = importlib.util.spec_from_file_location("replay", Path(__file__).with_name("replay.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["replay"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_headers_are_the_recorded_ones_and_no_others(replay: Any) -> None:
    (call, *_) = replay.calls("comfy-api-simplified-upload")
    request = call.request("http://127.0.0.1:8188")
    sent = {name.decode(): value.decode() for name, value in request.headers.raw}
    assert sent.keys() - {"Host", "Content-Length"} == {"user-agent", "accept", "content-type"}


def test_a_form_has_the_recorded_parts_with_our_picture(replay: Any) -> None:
    call = next(replay.calls("openai-python-edit"))
    (kind,) = (value for name, value in call.headers if name == "content-type")
    message = BytesParser().parsebytes(f"Content-Type: {kind}\r\n\r\n".encode() + call.content)
    parts = [(part.get_param("name", header="content-disposition"), part) for part in message.get_payload()]
    assert [name for name, _ in parts] == ["prompt", "model", "size", "image"]
    assert parts[-1][1].get_payload(decode=True) == replay.picture()


def test_fields_are_replaced_where_the_recording_has_them(replay: Any) -> None:
    (_, call) = replay.calls("webuiapi-txt2img", replay.Fill(fields={"steps": 2, "seed": ..., "absent": 1}))
    assert call.json["steps"] == 2
    assert call.json.keys() & {"seed", "absent"} == set()
    (image,) = next(replay.calls("webuiapi-img2img")).json["init_images"]
    assert image.startswith("data:image/png;base64,iVBOR")


def test_a_graph_takes_the_place_of_its_description(replay: Any) -> None:
    graph = {"9": {"class_type": "SaveImage", "inputs": {}}}
    bodies = [call for call in replay.calls("sillytavern-comfyui", replay.Fill(graph=graph, words={"<raw>": "a"}))
              if call.content]  # fmt: skip
    assert [json.loads(call.content) for call in bodies] == [{"prompt": graph}]
    drawn = [call.json["prompt"] for call in replay.calls("comfy-api-client-draw", replay.Fill(graph=graph))
             if call.path == "/prompt"]  # fmt: skip
    assert drawn == [graph]


def test_a_stand_in_that_nothing_fills_is_an_error(replay: Any) -> None:
    for name in ("litellm-generate", "litellm-edit", "sillytavern-comfyui"):
        with pytest.raises(ValueError, match=r"stand-in|in words"):
            list(replay.calls(name))


def test_every_recording_can_be_read(replay: Any) -> None:
    names = sorted(path.stem for path in replay.CLIENTS.glob("*.json"))
    assert len(names) == 16
    assert [kind for kind, _ in replay.frames("comfy-api-simplified-draw")][-1] == "executing"
    assert [call.query for call in replay.handshakes("comfy-api-simplified-draw")] == [
        "clientId=ecf09c9b-e5e6-420d-a7bd-4605f9912e25"
    ]
