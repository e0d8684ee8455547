"""The table of nodes: what the docs show of it is what the reader uses, and every input of it is taken or named."""

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sdxl_trt.engines
from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime.comfy_node import REQUIRED, Input
from sdxl_trt.runtime.comfy_nodes import NODES
from sdxl_trt.runtime.workflow_reader import read_workflow

DOCS = Path(sdxl_trt.engines.__file__).parent.parent / "docs" / "comfyui.md"
LINKS = ("MODEL", "CLIP", "VAE", "CONDITIONING", "LATENT", "IMAGE")
Json = Any
SCALE = {"upscale_method": "bicubic", "width": 64, "height": 64, "crop": "disabled"}
SAMPLING = {"steps": 4, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal", "model": ["4", 0]}
SIZES = {"width": 64, "height": 64, "crop_w": 0, "crop_h": 0, "target_width": 64, "target_height": 64}
GRAPH: dict[str, tuple[str, dict[str, Any]]] = {
    "4": ("CheckpointLoaderSimple", {"ckpt_name": "base.safetensors"}),
    "12": ("CheckpointLoaderSimple", {"ckpt_name": "refiner.safetensors"}),
    "13": ("VAELoader", {"vae_name": "own.safetensors"}),
    "14": ("LoraLoader", {"model": ["4", 0], "clip": ["4", 1], "lora_name": "a", "strength_model": 0.5,
                          "strength_clip": 0.25}),
    "15": ("LoraLoaderModelOnly", {"model": ["14", 0], "lora_name": "b", "strength_model": 0.5}),
    "16": ("CLIPSetLastLayer", {"clip": ["14", 1], "stop_at_clip_layer": -2}),
    "40": ("PrimitiveInt", {"value": 7}), "41": ("PrimitiveFloat", {"value": 0.5}),
    "42": ("PrimitiveString", {"value": "red"}), "43": ("PrimitiveStringMultiline", {"value": "fox"}),
    "20": ("CLIPTextEncode", {"clip": ["16", 0], "text": ["42", 0]}),
    "21": ("CLIPTextEncodeSDXL", {"clip": ["16", 0], "text_g": ["43", 0], "text_l": "l", **SIZES}),
    "22": ("CLIPTextEncodeSDXLRefiner", {"clip": ["12", 1], "text": "r", "ascore": 6.0, "width": 64, "height": 64}),
    "23": ("ConditioningZeroOut", {"conditioning": ["20", 0]}),
    "24": ("ConditioningConcat", {"conditioning_to": ["21", 0], "conditioning_from": ["20", 0]}),
    "25": ("ConditioningAverage", {"conditioning_to": ["24", 0], "conditioning_from": ["20", 0],
                                   "conditioning_to_strength": ["41", 0]}),
    "26": ("ConditioningCombine", {"conditioning_1": ["25", 0], "conditioning_2": ["20", 0]}),
    "5": ("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}),
    "30": ("KSampler", {"seed": ["40", 0], "denoise": 0.9, "positive": ["26", 0], "negative": ["23", 0],
                        "latent_image": ["5", 0], **SAMPLING, "model": ["15", 0]}),
    "31": ("LatentUpscale", {"samples": ["30", 0], **SCALE}),
    "32": ("LatentUpscaleBy", {"samples": ["31", 0], "upscale_method": "area", "scale_by": 2.0}),
    "33": ("RepeatLatentBatch", {"samples": ["32", 0], "amount": 1}),
    "34": ("KSamplerAdvanced", {"noise_seed": 1, "add_noise": "enable", "start_at_step": 1, "end_at_step": 3,
                                "return_with_leftover_noise": "enable", "positive": ["22", 0], "negative": ["22", 0],
                                "latent_image": ["33", 0], **SAMPLING, "model": ["12", 0]}),
    "35": ("VAEDecode", {"samples": ["34", 0], "vae": ["12", 2]}),
    "36": ("ImageScale", {"image": ["35", 0], **SCALE}),
    "37": ("ImageScaleBy", {"image": ["36", 0], "upscale_method": "lanczos", "scale_by": 2.0}),
    "38": ("SaveImage", {"images": ["37", 0], "filename_prefix": "x"}),
    "50": ("LoadImage", {"image": "in.png"}),
    "51": ("VAEEncode", {"pixels": ["50", 0], "vae": ["13", 0]}),
    "52": ("KSampler", {"seed": 1, "denoise": 0.5, "positive": ["22", 0], "negative": ["22", 0],
                        "latent_image": ["51", 0], **SAMPLING, "model": ["12", 0]}),
    "53": ("VAEDecodeTiled", {"samples": ["52", 0], "vae": ["12", 2], "tile_size": 512, "overlap": 64,
                              "temporal_size": 64, "temporal_overlap": 8}),
    "54": ("VAEEncodeTiled", {"pixels": ["53", 0], "vae": ["12", 2], "tile_size": 512, "overlap": 64,
                              "temporal_size": 64, "temporal_overlap": 8}),
    "55": ("KSampler", {"seed": 1, "denoise": 0.5, "positive": ["22", 0], "negative": ["22", 0],
                        "latent_image": ["54", 0], **SAMPLING, "model": ["12", 0]}),
    "56": ("VAEDecode", {"samples": ["55", 0], "vae": ["12", 2]}),
    "57": ("PreviewImage", {"images": ["56", 0]}),
    # What a link can be moved to.
    "60": ("LoraLoader", {"model": ["4", 0], "clip": ["4", 1], "lora_name": "z", "strength_model": 0.1,
                          "strength_clip": 0.1}),
    "61": ("VAELoader", {"vae_name": "other.safetensors"}),
    "62": ("CLIPTextEncode", {"clip": ["60", 1], "text": "another"}),
    "63": ("EmptyLatentImage", {"width": 128, "height": 64, "batch_size": 2}),
    "64": ("LoadImage", {"image": "other.png"}),
}  # fmt: skip
OTHER_LINKS = {"MODEL": ["60", 0], "CLIP": ["60", 1], "VAE": ["61", 0], "CONDITIONING": ["62", 0],
               "LATENT": ["63", 0], "IMAGE": ["64", 0]}  # fmt: skip
INPUTS = [(kind, each.name) for kind, node in NODES.items() for each in node.inputs]


def _other(known: Input, value: Any) -> Any:
    """Return another value that ComfyUI takes too."""
    if known.is_link:
        return OTHER_LINKS[known.type]
    if known.type == "CHOICE":
        return next(choice for choice in known.choices if choice != value)
    if known.type == "STRING":
        return f"{value} too"
    number = value if isinstance(value, int | float) else 1
    step = 1 if known.type == "INT" else 0.125
    return number + step if number + step <= known.high else number - step


def _row(name: str) -> str:
    node = NODES[name]
    told = [
        f"`{each.name}`" + ("" if each.followed == "as in ComfyUI" else f" ({each.followed})") for each in node.inputs
    ]
    return f"| {name} | {', '.join(told)} |"


def test_the_docs_have_the_table_of_the_code() -> None:
    table = "\n".join(["| node | inputs |", "|---|---|", *map(_row, NODES)])
    assert table in DOCS.read_text(encoding="utf-8"), f"docs/comfyui.md is to have this table:\n{table}"


def test_every_class_of_the_table_is_in_the_graph() -> None:
    assert {kind for kind, _ in GRAPH.values()} == set(NODES)


@pytest.fixture
def said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Callable[[Json], tuple[Any, tuple[str, ...]]]:
    """Return a function that reads a graph: what is drawn, and the lines that are printed; or the error."""

    def read(graph: Json) -> tuple[Any, tuple[str, ...]]:
        caplog.clear()
        path = tmp_path / "graph.json"
        stored = {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in graph.items()}
        path.write_text(json.dumps(stored))
        with caplog.at_level(logging.WARNING):
            try:
                # A preview is read where nothing is saved.
                return read_workflow(path).outputs, tuple(record.getMessage() for record in caplog.records)
            except UsageError as exc:
                return str(exc), ()

    return read


@pytest.mark.parametrize(("kind", "name"), INPUTS, ids=[f"{kind}.{name}" for kind, name in INPUTS])
def test_no_input_is_ignored_in_silence(said: Any, kind: str, name: str) -> None:
    key = next(key for key, (each, _) in GRAPH.items() if each == kind)
    graph = copy.deepcopy(GRAPH)
    if int(key) >= 50 or kind == "VAELoader":  # the second picture's: it is a preview, which is read where it is alone
        del graph["38"]
    before = said(graph)
    assert not isinstance(before[0], str), before[0]
    known = NODES[kind].input(name)
    graph[key][1][name] = _other(known, graph[key][1].get(name, known.default))
    changed = said(graph)
    assert changed != before
    if known.default is REQUIRED or known.is_link:
        del graph[key][1][name]
        assert f"node {key} ({kind})" in str(said(graph)) or "PrimitiveInt" in str(said(graph)) or "Primitive" in kind


@pytest.mark.parametrize("kind", NODES)
def test_what_no_node_has_is_named(said: Any, kind: str) -> None:
    key = next(key for key, (each, _) in GRAPH.items() if each == kind)
    graph = copy.deepcopy(GRAPH)
    if int(key) >= 50 or kind == "VAELoader":
        del graph["38"]
    if kind.startswith("Primitive"):
        return  # their values stand in the nodes that they feed
    graph[key][1]["brand_new"] = 1
    assert f"node {key} ({kind}): brand_new: no input that is known here" in "\n".join(said(graph)[1])
