"""Refusals in ComfyUI's shapes and types, and the menus that clients read before they send anything."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from sdxl_trt.runtime.comfyui import NODES
from sdxl_trt.server import Options

Json = dict[str, Any]
Fake = Callable[..., tuple[TestClient, Any]]
LACKS = object()


def _refused(client: TestClient, **body: Any) -> Json:
    answer = client.post("/prompt", json=body)
    assert answer.status_code == 400, answer.text
    told: Json = answer.json()
    assert told.keys() == {"error", "node_errors"}
    assert told["error"].keys() == {"type", "message", "details", "extra_info"}
    return told


@pytest.fixture(scope="module")
def asked(shared_fake: Fake) -> tuple[TestClient, Any]:
    """Return a client and its desk for graphs that are all refused."""
    return shared_fake()


@pytest.mark.parametrize(("node", "name", "value", "kind"), [
    ("3", "seed", LACKS, "required_input_missing"),
    ("3", "model", LACKS, "required_input_missing"),
    ("3", "model", ["4"], "bad_linked_input"),
    ("3", "model", ["99", 0], "bad_linked_input"),
    ("3", "model", "base", "bad_linked_input"),
    ("3", "model", ["4", 2], "return_type_mismatch"),
    ("3", "model", ["4", 9], "return_type_mismatch"),
    ("3", "model", ["4", -1], "return_type_mismatch"),
    ("3", "steps", "many", "invalid_input_type"),
    ("3", "steps", True, "invalid_input_type"),
    ("3", "steps", {"x": 1}, "invalid_input_type"),
    ("3", "steps", 1e308, "value_bigger_than_max"),
    ("3", "steps", 0, "value_smaller_than_min"),
    ("3", "cfg", 101, "value_bigger_than_max"),
    ("3", "seed", 2**64, "value_bigger_than_max"),
    ("3", "seed", -1, "value_smaller_than_min"),
    ("3", "sampler_name", "none", "value_not_in_list"),
    ("3", "scheduler", "none", "value_not_in_list"),
    ("6", "text", {"x": 1}, "invalid_input_type"),
])  # fmt: skip
def test_a_wrong_input_has_comfyuis_type(
    asked: tuple[TestClient, Any], graph: Json, node: str, name: str, value: Any, kind: str
) -> None:
    client, desk = asked
    inputs = graph[node]["inputs"]
    inputs.pop(name) if value is LACKS else inputs.update({name: value})
    told = _refused(client, prompt=graph)
    assert told["error"]["type"] == "prompt_outputs_failed_validation"
    (error,) = told["node_errors"][node]["errors"]
    assert (error["type"], error["extra_info"]["input_name"]) == (kind, name)
    assert told["node_errors"][node]["dependent_outputs"] == ["9"]
    assert told["node_errors"][node]["class_type"] == graph[node]["class_type"]
    assert desk.orders == []


def test_graphs_that_are_none_have_comfyuis_types(fake: Fake, graph: Json) -> None:
    client, _ = fake()
    kinds = [_refused(client, **body)["error"]["type"] for body in (
        {}, {"prompt": {}}, {"prompt": [1]}, {"prompt": {"1": {"class_type": "Unknown", "inputs": {}}}},
        {"prompt": {"1": {"inputs": {}}}}, {"prompt": {"1": 3}}, {"prompt": {"1": {"class_type": 3}}},
        {"prompt": {"1": {"class_type": "SaveImage", "inputs": []}}},
        {"prompt": {key: graph[key] for key in "4567"}}, {"prompt": graph, "partial_execution_targets": []},
    )]  # fmt: skip
    assert kinds == ["no_prompt", "no_prompt", "no_prompt", "missing_node_type", "invalid_prompt", "invalid_prompt",
                     "invalid_prompt", "invalid_prompt", "prompt_no_outputs", "prompt_no_outputs"]  # fmt: skip


def test_a_circle_of_links_is_named(fake: Fake, graph: Json) -> None:
    client, _ = fake()
    graph["30"] = {"class_type": "RepeatLatentBatch", "inputs": {"samples": ["31", 0], "amount": 1}}
    graph["31"] = {"class_type": "RepeatLatentBatch", "inputs": {"samples": ["30", 0], "amount": 1}}
    graph["3"]["inputs"]["latent_image"] = ["30", 0]
    (error,) = _refused(client, prompt=graph)["node_errors"]["9"]["errors"]
    assert error["type"] == "dependency_cycle"


def test_two_thousand_nodes_in_a_row_are_refused_without_a_stack(fake: Fake, graph: Json) -> None:
    client, _ = fake()
    for number in range(2000):
        graph[f"n{number}"] = {"class_type": "RepeatLatentBatch", "inputs": {"samples": [f"n{number + 1}", 0]}}
    graph["n2000"] = graph["5"]
    graph["3"]["inputs"]["latent_image"] = ["n0", 0]
    assert _refused(client, prompt=graph)["error"]["type"] == "prompt_outputs_failed_validation"


def test_one_bad_output_leaves_the_others(fake: Fake, graph: Json) -> None:
    client, desk = fake()
    graph["19"] = {"class_type": "PreviewImage", "inputs": {"images": ["5", 0]}}
    answer = client.post("/prompt", json={"prompt": graph})
    assert answer.status_code == 200
    assert [*answer.json()["node_errors"]] == ["19"]
    assert client.get(f"/history/{answer.json()['prompt_id']}").status_code == 200
    assert len(desk.orders) == 1


def test_a_null_prompt_is_an_empty_one(fake: Fake, graph: Json) -> None:
    client, desk = fake()
    graph["7"]["inputs"]["text"] = None
    assert client.post("/prompt", json={"prompt": graph}).status_code == 200
    assert desk.orders[0].work.nodes["7"]["inputs"]["text"] == ""


def test_every_class_is_told_in_the_old_form(fake: Fake) -> None:
    client, _ = fake()
    info = client.get("/object_info").json()
    assert info.keys() == {*NODES, "UNETLoader"}
    for name, each in info.items():
        assert each["input_order"] == {group: [*inputs] for group, inputs in each["input"].items()}, name
        for value in each["input"]["required"].values():
            assert isinstance(value, list)
            assert value[0] != "COMBO"
    assert client.get("/object_info/KSampler").json() == {"KSampler": info["KSampler"]}
    assert client.get("/object_info/None").json() == {}
    assert info["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"][0] == ["base", "refiner"]
    assert info["KSampler"]["input"]["required"]["steps"][1] == {"default": 20, "min": 1, "max": 10000}
    assert info["UNETLoader"]["input"]["required"]["unet_name"][0] == []
    assert info["VAELoader"]["input"]["required"]["vae_name"][0] == []


def test_menus_list_the_folders_without_links(fake: Fake, tmp_path: Path) -> None:
    (tmp_path / "loras" / "sub").mkdir(parents=True)
    for name in ("a.safetensors", "sub/b.safetensors", "c.txt"):
        (tmp_path / "loras" / name).write_bytes(b"")
    (tmp_path / "loras" / "link.safetensors").symlink_to(tmp_path / "loras" / "a.safetensors")
    client, _ = fake(Options(lora_dir=tmp_path / "loras", embedding_dir=tmp_path / "loras"))
    names = client.get("/object_info/LoraLoader").json()["LoraLoader"]["input"]["required"]["lora_name"][0]
    assert names == ["a.safetensors", "sub/b.safetensors"]
    assert client.get("/embeddings").json() == ["a", "sub/b"]
    assert client.get("/models/loras").json() == names
    assert "loras" in client.get("/api/models").json()
    assert client.get("/models/none").status_code == 404


def test_small_lists_are_there(fake: Fake) -> None:
    client, _ = fake()
    stats = client.get("/system_stats").json()
    assert stats["system"]["argv"] == []
    assert stats["devices"][0]["name"] == "ort-cpu"
    assert client.get("/features").json()["max_upload_size"] == Options().max_body
    assert client.get("/extensions").json() == []
    assert client.post("/free", json={"unload_models": True}).status_code == 200
    assert client.post("/upload/mask").status_code == 404
