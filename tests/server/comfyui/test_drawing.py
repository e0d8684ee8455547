"""Graphs that are drawn on the embedded pair: the pixels of trt-generate, and the nodes that the frames name."""

import io
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from sdxl_trt.runtime import Pipeline
from sdxl_trt.runtime.cli.generate import main

Json = dict[str, Any]


def _finished(client: TestClient, graph: Json, **more: Any) -> tuple[Json, list[Json]]:
    """Queue a graph and return its entry in the history, and the frames until its end."""
    with client.websocket_connect("/ws?clientId=one") as socket:
        answer = client.post("/prompt", json={"prompt": graph, "client_id": "one", **more})
        assert answer.status_code == 200, answer.text
        identity, frames = answer.json()["prompt_id"], []
        while not frames or frames[-1]["data"].get("node", "") is not None or frames[-1]["type"] != "executing":
            frames.append(socket.receive_json())
        return client.get(f"/history/{identity}").json()[identity], frames


def _pictures(client: TestClient, entry: Json, node: str) -> list[Image.Image]:
    named = entry["outputs"][node]["images"]
    return [Image.open(io.BytesIO(client.get("/view", params=each).content)) for each in named]


def _node(kind: str, **inputs: Any) -> Json:
    return {"class_type": kind, "inputs": inputs}


@pytest.fixture
def pair(graph: Json) -> Json:
    """A base and a refiner on one grid."""
    shared = {"noise_seed": 7, "steps": 3, "cfg": 6.0, "sampler_name": "euler", "scheduler": "normal"}
    graph["3"] = _node("KSamplerAdvanced", **shared, add_noise="enable", start_at_step=0, end_at_step=2,
                       return_with_leftover_noise="enable", model=["4", 0], positive=["6", 0], negative=["7", 0],
                       latent_image=["5", 0])  # fmt: skip
    graph |= {
        "14": _node("CheckpointLoaderSimple", ckpt_name="refiner"),
        "16": _node("CLIPTextEncode", text="a red star", clip=["14", 1]),
        "17": _node("CLIPTextEncode", text="blur", clip=["14", 1]),
        "13": _node("KSamplerAdvanced", **shared, add_noise="disable", start_at_step=2, end_at_step=10000,
                    return_with_leftover_noise="disable", model=["14", 0], positive=["16", 0], negative=["17", 0],
                    latent_image=["3", 0]),
        "8": _node("VAEDecode", samples=["13", 0], vae=["14", 2]),
    }  # fmt: skip
    return graph


@pytest.fixture
def command(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Json], Image.Image]:
    """Draw a graph with trt-generate, on the pipeline that is open already."""

    def drawn(graph: Json) -> Image.Image:
        monkeypatch.setattr("sdxl_trt.runtime.pipeline.open_bundle", lambda *_, **__: nullcontext(pipeline))
        (tmp_path / "graph.json").write_text(json.dumps(graph), encoding="utf-8")
        out = tmp_path / "drawn.png"
        assert main(["--workflow", str(tmp_path / "graph.json"), "-o", str(out), "--json"]) == 0
        return Image.open(out)

    return drawn


def test_a_pair_has_the_commands_pixels_and_graph(
    drawing: TestClient, pair: Json, command: Callable[[Json], Image.Image]
) -> None:
    entry, frames = _finished(drawing, pair)
    (picture,) = _pictures(drawing, entry, "9")
    own = command(pair)
    assert np.array_equal(np.asarray(picture), np.asarray(own))
    assert json.loads(picture.info["prompt"]) == json.loads(own.info["prompt"])
    working = [frame["data"]["node"] for frame in frames if frame["type"] == "executing"]
    assert working == ["6", "7", "16", "17", "3", "13", "8", "9", None]
    steps = [(each["data"]["node"], each["data"]["value"], each["data"]["max"]) for each in frames
             if each["type"] == "progress"]  # fmt: skip
    assert steps == [("3", 1, 2), ("3", 2, 2), ("13", 1, 1)]


def test_a_chain_with_two_outputs_and_a_loaded_picture(
    drawing: TestClient, graph: Json, tmp_path: Path, command: Callable[[Json], Image.Image]
) -> None:
    content = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(content, "PNG")
    (tmp_path / "start.png").write_bytes(content.getvalue())
    answer = drawing.post("/upload/image", files={"image": ("start.png", content.getvalue())})
    assert answer.json() == {"name": "start.png", "subfolder": "", "type": "input"}
    graph |= {
        "20": _node("LoadImage", image="start.png"), "21": _node("VAEEncode", pixels=["20", 0], vae=["4", 2]),
        "22": graph["3"] | {"inputs": graph["3"]["inputs"] | {"latent_image": ["3", 0], "denoise": 0.6, "seed": 9}},
        "23": _node("VAEDecode", samples=["22", 0], vae=["4", 2]), "24": _node("PreviewImage", images=["23", 0]),
        "25": _node("PreviewImage", images=["8", 0]),
    }  # fmt: skip
    graph["3"]["inputs"] |= {"latent_image": ["21", 0], "denoise": 0.5}
    entry, frames = _finished(drawing, graph)
    assert set(entry["outputs"]) == {"9", "24", "25"}
    assert {node: each["images"][0]["type"] for node, each in entry["outputs"].items()} == {
        "9": "output", "24": "temp", "25": "temp"}  # fmt: skip
    (first,), (second,), (copy,) = (_pictures(drawing, entry, node) for node in ("9", "24", "25"))
    assert first.tobytes() == copy.tobytes() != second.tobytes()
    saved = {key: each for key, each in graph.items() if key not in ("22", "23", "24", "25")}
    assert first.tobytes() == command(saved).tobytes()
    working = [frame["data"]["node"] for frame in frames if frame["type"] == "executing"]
    assert working == ["6", "7", "21", "3", "8", "9", "25", "22", "23", "24", None]


def test_what_cannot_be_drawn_is_refused_at_once_at_its_node(drawing: TestClient, graph: Json) -> None:
    graph["20"] = _node("LoraLoader", model=["4", 0], clip=["4", 1], lora_name="none.safetensors", strength_model=1,
                        strength_clip=1)  # fmt: skip
    graph["3"]["inputs"]["model"] = ["20", 0]
    answer = drawing.post("/prompt", json={"prompt": graph})
    assert answer.status_code == 400
    body = answer.json()
    assert body["error"]["type"] == "prompt_outputs_failed_validation"
    (error,) = body["node_errors"]["20"]["errors"]
    assert error["type"] == "custom_validation_failed"
    assert "none.safetensors" in error["details"]
    graph["3"]["inputs"]["model"] = ["4", 0]
    graph["5"]["inputs"]["width"] = 72
    body = drawing.post("/prompt", json={"prompt": graph}).json()
    assert list(body["node_errors"]) == ["5"]


def test_ignored_things_are_told_and_not_logged(
    drawing: TestClient, graph: Json, caplog: pytest.LogCaptureFixture
) -> None:
    graph["6"]["inputs"]["text"] = "a {marker|word} star"
    graph["4"]["inputs"]["ckpt_name"] = "another.safetensors"
    graph["7"]["inputs"]["text"] = None
    entry, _ = _finished(drawing, graph)
    assert entry["status"]["status_str"] == "success"
    assert "marker" not in caplog.text


def test_no_job_stays_in_memory_after_its_end(drawing: TestClient, pair: Json, left_tickets: Callable[[], int]) -> None:
    for seed in range(3):
        pair["3"]["inputs"]["noise_seed"] = seed
        _finished(drawing, pair)
    assert left_tickets() <= 1
