"""ComfyUI workflows: API, editor and PNG forms agree, unsupported nodes are named, nothing crashes or hangs."""

import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime.comfyui.graph import MAX_BYTES
from sdxl_trt.runtime.comfyui.reader import read_workflow, workflow_of
from sdxl_trt.runtime.comfyui.workflow import (
    TO_THE_END,
    Clip,
    Conditioning,
    Decoded,
    Empty,
    Encoded,
    Loaded,
    LoraNode,
    Mix,
    Model,
    Output,
    Repeated,
    Resized,
    Sampled,
    Scaled,
    VaeName,
    Workflow,
)

Json = Any
POSITIVE = {"width": 4096, "height": 2048, "crop_w": 1, "crop_h": 2, "target_width": 1024, "target_height": 512,
            "text_g": "a fox", "text_l": "red"}  # fmt: skip


def _sampler(model: str, positive: str, negative: str, latents: str, **changes: Any) -> Json:
    inputs = {
        "add_noise": "enable", "noise_seed": 2**63, "steps": 50, "cfg": 8.0, "sampler_name": "euler",
        "scheduler": "normal", "start_at_step": 0, "end_at_step": 40, "return_with_leftover_noise": "enable",
        "model": [model, 0], "positive": [positive, 0], "negative": [negative, 0], "latent_image": [latents, 0],
    }  # fmt: skip
    return {"class_type": "KSamplerAdvanced", "inputs": inputs | changes}


def _prompt(text: str, checkpoint: str) -> Json:
    inputs = {"ascore": 6.0, "width": 1024, "height": 512, "text": text, "clip": [checkpoint, 1]}
    return {"class_type": "CLIPTextEncodeSDXLRefiner", "inputs": inputs}


@pytest.fixture
def api() -> Json:
    """Base and refiner as in a tutorial: 40 of 50 steps, leftover noise, the refiner adds none."""
    return {
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "base.safetensors"}},
        "12": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "refiner.safetensors"}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 1024, "height": 512, "batch_size": 2}},
        "6": {"class_type": "CLIPTextEncodeSDXL", "inputs": POSITIVE | {"clip": ["4", 1]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "bad", "clip": ["4", 1]}},
        "8": {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["7", 0]}},
        "15": _prompt("a fox", "12"), "16": _prompt("bad", "12"),
        "10": _sampler("4", "6", "8", "5"),
        "11": _sampler("12", "15", "16", "10", add_noise="disable", start_at_step=40, end_at_step=10000,
                       return_with_leftover_noise="disable"),
        "17": {"class_type": "VAEDecode", "inputs": {"samples": ["11", 0], "vae": ["12", 2]}},
        "19": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x", "images": ["17", 0]}},
    }  # fmt: skip


@pytest.fixture
def read(tmp_path: Path) -> Callable[[Any], Workflow]:
    """Return a function that reads a workflow from a JSON file with this content."""

    def load(content: Any) -> Workflow:
        path = tmp_path / "workflow.json"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return read_workflow(path)

    return load


def test_base_and_refiner_are_read_with_all_their_settings(api: Json, read: Any) -> None:
    workflow = read(api)
    base, refiner = workflow.samplings
    clips = Clip("base.safetensors"), Clip("refiner.safetensors")
    empty = Empty(1024, 512, 2)
    assert workflow.outputs == (
        Output(Decoded(Sampled(Sampled(empty, base), refiner), VaeName("refiner.safetensors")), "x"),
    )
    assert (base.model, refiner.model) == (Model("base.safetensors"), Model("refiner.safetensors"))
    assert (base.add_noise, base.start, base.end, base.leftover_noise) == (True, 0, 40, True)
    assert (refiner.add_noise, refiner.start, refiner.end, refiner.leftover_noise) == (False, 40, TO_THE_END, False)
    assert (base.seed, base.steps, base.cfg, base.sampler, base.schedule) == (2**63, 50, 8.0, "euler", "normal")
    assert base.positive == (Conditioning("6", "a fox", "red", clips[0], (2048, 4096), (2, 1), (512, 1024)),)
    assert base.negative == (Conditioning("7", "bad", "bad", clips[0], mixes=(Mix("zero"),)),)
    prompt = Conditioning("15", "a fox", "a fox", clips[1], (512, 1024), (0, 0), (512, 1024), score=6.0)
    assert refiner.positive == (prompt,)
    assert json.loads(workflow.graph) == api


def test_a_ksampler_with_loras_and_a_picture_is_read(api: Json, read: Any) -> None:
    lora = {"lora_name": "a", "strength_model": 0.5, "strength_clip": 0.25, "model": ["4", 0], "clip": ["4", 1]}
    api["20"] = {"class_type": "LoraLoader", "inputs": lora}
    api["21"] = {
        "class_type": "LoraLoaderModelOnly",
        "inputs": {"lora_name": "b", "strength_model": 2, "model": ["20", 0]},
    }
    api["23"] = {"class_type": "CLIPSetLastLayer", "inputs": {"stop_at_clip_layer": -3, "clip": ["20", 1]}}
    api["7"]["inputs"]["clip"] = ["23", 0]
    api["22"] = {"class_type": "LoadImage", "inputs": {"image": "in.png"}}
    api["5"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["22", 0], "vae": ["4", 2]}}
    api["10"] = {"class_type": "KSampler", "inputs": {
        "seed": 3, "steps": 20, "cfg": 7, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 0.3,
        "model": ["21", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}}  # fmt: skip
    workflow = read(api)
    base = workflow.samplings[0]
    start = workflow.outputs[0].image.latents.latents.latents
    assert start == Encoded(Loaded("in.png"), VaeName("base.safetensors"))
    assert base.model == Model("base.safetensors", (LoraNode("a", 0.5), LoraNode("b", 2)))
    assert base.positive[0].clip == Clip("base.safetensors")
    assert base.negative[0].clip == Clip("base.safetensors", (LoraNode("a", 0.25),), -3)
    assert (base.seed, base.denoise, base.add_noise, base.start, base.end) == (3, 0.3, True, 0, TO_THE_END)
    assert workflow.loads_image


def test_scaled_latents_and_images_are_read(api: Json, read: Any) -> None:
    size = {"width": 256, "height": 0, "crop": "center"}
    api["20"] = {"class_type": "LatentUpscaleBy",
                 "inputs": {"samples": ["10", 0], "upscale_method": "bislerp", "scale_by": 2}}  # fmt: skip
    api["11"]["inputs"]["latent_image"] = ["20", 0]
    api["21"] = {"class_type": "ImageScale", "inputs": {"image": ["17", 0], "upscale_method": "lanczos", **size}}
    api["22"] = {"class_type": "VAELoader", "inputs": {"vae_name": "own.safetensors"}}
    api["23"] = {"class_type": "VAEEncodeTiled", "inputs": {"pixels": ["21", 0], "vae": ["22", 0]}}
    api["24"] = copy.deepcopy(api["11"]) | {"inputs": api["11"]["inputs"] | {"latent_image": ["25", 0]}}
    api["25"] = {"class_type": "RepeatLatentBatch", "inputs": {"samples": ["23", 0], "amount": 3}}
    api["26"] = {"class_type": "VAEDecode", "inputs": {"samples": ["24", 0], "vae": ["12", 2]}}
    api["19"]["inputs"]["images"] = ["26", 0]
    (output,) = read(api).outputs
    base, refiner, last = read(api).samplings
    middle = Sampled(Resized(Sampled(Empty(1024, 512, 2), base), "bislerp", by=2.0), refiner)
    scaled = Scaled(Decoded(middle, VaeName("refiner.safetensors")), "lanczos", (256, 0), centred=True)
    encoded = Encoded(scaled, VaeName("own.safetensors", own_file=True), tiled=True)
    assert output.image == Decoded(Sampled(Repeated(encoded, 3), last), VaeName("refiner.safetensors"))


def test_combined_joined_and_averaged_prompts_are_read(api: Json, read: Any) -> None:
    def node(key: str, kind: str, **inputs: Any) -> None:
        api[key] = {"class_type": kind, "inputs": inputs}

    node("20", "ConditioningConcat", conditioning_to=["6", 0], conditioning_from=["7", 0])
    node("21", "ConditioningAverage", conditioning_to=["7", 0], conditioning_from=["20", 0],
         conditioning_to_strength=0.25)  # fmt: skip
    node("22", "ConditioningCombine", conditioning_1=["20", 0], conditioning_2=["21", 0])
    node("23", "ConditioningZeroOut", conditioning=["22", 0])
    api["10"]["inputs"]["positive"] = ["23", 0]
    joined, averaged = read(api).samplings[0].positive
    assert [mix.kind for mix in joined.mixes] == ["concat", "zero"]
    assert joined.mixes[0].other.text_g == "bad"
    assert [(mix.kind, mix.strength) for mix in averaged.mixes] == [("average", 0.25), ("zero", 1.0)]
    assert averaged.mixes[0].other.mixes[0].other.text_g == "bad"
    for _ in range(5):  # each doubles the number of prompts
        number = len(api) + 100
        node(str(number), "ConditioningCombine", conditioning_1=api["10"]["inputs"]["positive"],
             conditioning_2=api["10"]["inputs"]["positive"])  # fmt: skip
        api["10"]["inputs"]["positive"] = [str(number), 0]
    with pytest.raises(UsageError, match="more than 16 prompts"):
        read(api)


def test_every_saved_picture_is_drawn_and_previews_are_named(api: Json, read: Any, caplog: Any) -> None:
    api["30"] = {"class_type": "VAEDecode", "inputs": {"samples": ["10", 0], "vae": ["4", 2]}}
    api["31"] = {"class_type": "PreviewImage", "inputs": {"images": ["30", 0]}}
    (whole,) = read(api).outputs
    assert "node 31 (PreviewImage): is not drawn: it is a preview" in caplog.text
    api["31"] = {"class_type": "SaveImage", "inputs": {"images": ["30", 0], "filename_prefix": "base"}}
    first, second = read(api).outputs
    assert (first, second.prefix) == (whole, "base")
    assert [sampling.node for sampling in read(api).samplings] == ["10", "11"]


def test_pictures_that_can_be_drawn_are_drawn_and_the_others_named(api: Json, read: Any, caplog: Any) -> None:
    whole = read(api)
    api["30"] = {"class_type": "FancyUpscaler", "inputs": {"image": ["17", 0]}}
    api["31"] = {"class_type": "SaveImage", "inputs": {"images": ["30", 0], "filename_prefix": "y"}}
    assert read(api) == whole
    assert "node 31 (SaveImage): is not drawn: node 30 (FancyUpscaler): is not supported" in caplog.text


WIDGETS = {
    "CheckpointLoaderSimple": ["ckpt_name"], "EmptyLatentImage": ["width", "height", "batch_size"],
    "CLIPTextEncode": ["text"], "CLIPTextEncodeSDXLRefiner": ["ascore", "width", "height", "text"],
    "CLIPTextEncodeSDXL": list(POSITIVE), "ConditioningZeroOut": [], "VAEDecode": [], "SaveImage": ["filename_prefix"],
    "KSamplerAdvanced": ["add_noise", "noise_seed", "*", "steps", "cfg", "sampler_name", "scheduler", "start_at_step",
                         "end_at_step", "return_with_leftover_noise"],
}  # fmt: skip


def _editor(api: Json) -> Json:
    """Return the editor's form of an API workflow, with the first text fed by a primitive and latents by a reroute."""
    nodes, links = [], []

    def link(origin: Any, slot: int, target: Any) -> int:
        links.append([len(links) + 1, origin, slot, target, 0, "X"])
        return len(links)

    for key, stored in api.items():
        kind, inputs = stored["class_type"], stored["inputs"]
        values = ["fixed" if name == "*" else inputs[name] for name in WIDGETS[kind]]
        slots = [{"name": name, "link": link(int(value[0]), value[1], int(key))}
                 for name, value in inputs.items() if isinstance(value, list)]  # fmt: skip
        if kind == "CLIPTextEncode":
            nodes.append({"id": 100, "type": "PrimitiveNode", "widgets_values": [values[0], "fixed"]})
            slots.append({"name": "text", "link": link(100, 0, int(key))})
            values = ["stale"]
        if kind == "VAEDecode":
            nodes.append({"id": 101, "type": "Reroute", "inputs": [{"name": "", "type": "*", "link": slots[0]["link"]}],
                          "outputs": [{"type": "LATENT"}]})  # fmt: skip
            slots[0] = {"name": "samples", "link": link(101, 0, int(key))}
        nodes.append({"id": int(key), "type": kind, "widgets_values": values, "inputs": slots, "mode": 0})
    nodes.append({"id": 200, "type": "Note", "widgets_values": ["read me"]})
    return {"nodes": nodes, "links": links, "version": 0.4}


def test_the_editors_form_reads_the_same(api: Json, read: Any) -> None:
    assert read(_editor(api)) == read(api)


@pytest.mark.parametrize(
    "body",
    [lambda api: {"prompt": api, "client_id": "x"}, lambda api: {"input": {"workflow": api}},
     lambda api: {"input": {"prompt": _editor(api)}}, lambda api: {"output": api, "workflow": {"nodes": []}}],
)  # fmt: skip
def test_a_graph_in_the_body_of_a_request_is_read(api: Json, read: Any, body: Callable[[Json], Any]) -> None:
    assert read(body(api)).outputs == read(api).outputs


def test_numbers_as_text_and_from_primitives_are_read(api: Json, read: Any) -> None:
    plain = read(api)
    api["10"]["inputs"] |= {"steps": "50", "cfg": "8.0", "noise_seed": ["40", 0]}
    api["40"] = {"class_type": "PrimitiveInt", "inputs": {"value": ["41", 0]}}
    api["41"] = {"class_type": "PrimitiveInt", "inputs": {"value": 2**63}}
    assert read(api) == plain


def test_a_muted_primitive_is_missing_and_the_stale_widget_value_is_not_used(api: Json, read: Any) -> None:
    editor = _editor(api)
    primitive = next(node for node in editor["nodes"] if node["type"] == "PrimitiveNode")
    primitive["mode"] = 2
    with pytest.raises(UsageError, match="node 100, which is missing or muted"):
        read(editor)


def test_a_muted_picture_is_not_drawn(api: Json, read: Any) -> None:
    editor = _editor(api)
    next(node for node in editor["nodes"] if node["type"] == "SaveImage")["mode"] = 2
    with pytest.raises(UsageError, match="no SaveImage"):
        read(editor)


@pytest.mark.parametrize("form", ["prompt", "workflow", "an empty prompt"])
def test_a_png_carries_a_workflow(api: Json, read: Any, tmp_path: Path, form: str) -> None:
    info = PngInfo()
    if form == "an empty prompt":
        info.add_text("prompt", "{}")
    info.add_text("prompt" if form == "prompt" else "workflow", json.dumps(api if form == "prompt" else _editor(api)))
    Image.new("RGB", (8, 8)).save(tmp_path / "made.png", pnginfo=info)
    assert read_workflow(tmp_path / "made.png") == read(api)


def test_a_png_without_a_workflow_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "bare.png")
    with pytest.raises(UsageError, match="carries no ComfyUI workflow"):
        read_workflow(tmp_path / "bare.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "bare.png").read_bytes()[:20])
    with pytest.raises(UsageError):
        read_workflow(tmp_path / "cut.png")


def test_all_unsupported_nodes_are_named_at_once(api: Json, read: Any) -> None:
    api["6"]["class_type"] = "CLIPTextEncodeFlux"
    api["12"]["class_type"] = "UNETLoader"
    with pytest.raises(UsageError) as caught:
        read(api)
    message = str(caught.value)
    assert "\n" not in message
    for name in ("node 6 (CLIPTextEncodeFlux)", "node 12 (UNETLoader)"):
        assert name in message


DAMAGE: dict[str, tuple[Callable[[Json], Any], str]] = {
    "no output": (lambda api: api.pop("19"), "no SaveImage"),
    "missing node": (lambda api: api.pop("10"), "links to node 10"),
    "circle": (lambda api: api["10"]["inputs"].update(latent_image=["11", 0]), "circle"),
    "self": (lambda api: api["10"]["inputs"].update(latent_image=["10", 0]), "circle"),
    "word for number": (lambda api: api["10"]["inputs"].update(steps="fifty"), "steps 'fifty' is not a whole number"),
    "half a step": (lambda api: api["10"]["inputs"].update(steps=1.5), "steps '1.5' is not a whole number"),
    "half a step in words": (lambda api: api["10"]["inputs"].update(steps="8.0"), "steps '8.0' is not a whole number"),
    "no step": (lambda api: api["10"]["inputs"].update(steps=0), "steps 0 is outside 1 to 10000"),
    "nan": (lambda api: api["10"]["inputs"].update(cfg=float("nan")), "cfg 'nan' is not a number"),
    "infinity": (lambda api: api["10"]["inputs"].update(cfg="inf"), "cfg inf is outside 0 to 100"),
    "true": (lambda api: api["10"]["inputs"].update(cfg=True), "cfg 'True' is not a number"),
    "neither": (
        lambda api: api["10"]["inputs"].update(add_noise="maybe"),
        "'maybe' is not supported; .*enable, disable",
    ),
    "list for text": (lambda api: api["6"]["inputs"].update(text_g=[1]), "text_g is not text"),
    "a missing value": (
        lambda api: api["10"]["inputs"].pop("cfg") and api["10"]["inputs"].pop("noise_seed"),
        "noise_seed is missing",
    ),
    "no clip": (lambda api: api["6"]["inputs"].pop("clip"), "node 6 .*nothing is linked to clip"),
    "the wrong output": (
        lambda api: api["10"]["inputs"].update(model=["4", 1]),
        "node 4 .*: gives MODEL and CLIP and VAE, but output 1 is linked as MODEL",
    ),
    "a bad primitive": (
        lambda api: (
            api.update({"40": {"class_type": "PrimitiveInt", "inputs": {"value": "x"}}})
            or api["10"]["inputs"].update(steps=["40", 0])
        ),
        r"node 40 \(PrimitiveInt\), which feeds steps of node 10 .*: its value 'x' is not a whole",
    ),
    "a styler": (
        lambda api: (
            api.update({"40": {"class_type": "Styler", "inputs": {}}}) or api["6"]["inputs"].update(text_g=["40", 0])
        ),
        r"workflow.json: node 40 \(Styler\): is not supported, where a value for text_g of node 6",
    ),
    "nothing linked": (lambda api: api["17"]["inputs"].update(samples=None), "nothing is linked to samples"),
    "other class": (lambda api: api["17"].update(class_type="VAEDecodeAudio"), "VAEDecodeAudio"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named(api: Json, read: Any, damage: Callable[[Json], Any], message: str) -> None:
    damage(api)
    with pytest.raises(UsageError, match=message):
        read(api)


JUNK = (
    b"", b"{", b"[]", b"{}", b"null", b"[" * 100_000, b"\xff\xfe", b'{"a": 1}', b'{"nodes": [], "links": []}',
    b'{"nodes": [{"type": []}], "links": 5}',
    b'{"nodes": [{"type": "SaveImage", "inputs": [{"name": "images", "link": []}]}]}',
)  # fmt: skip


@pytest.mark.parametrize("content", JUNK)
def test_other_files_are_refused(read: Any, content: bytes) -> None:
    with pytest.raises(UsageError):
        read(content)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(UsageError, match="larger than"):
        read_workflow(path)
    with pytest.raises(UsageError, match="No such file"):
        read_workflow(tmp_path / "none.json")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["4", "10", "11"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=150)
@given(data=st.data())
def test_a_workflow_with_any_content_is_read_or_refused(api: Json, read: Any, data: st.DataObject) -> None:
    graph = _editor(api) if data.draw(st.booleans()) else copy.deepcopy(api)
    for _ in range(data.draw(st.integers(1, 3))):
        place: Any = graph
        for _ in range(data.draw(st.integers(1, 4))):
            if not isinstance(place, dict | list) or not place:
                break
            key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else list(range(len(place)))))
            if data.draw(st.booleans()):
                place[key] = data.draw(VALUES)
                break
            place = place[key]
    with contextlib.suppress(UsageError):
        read(graph)


def test_a_graph_in_memory_has_all_its_pictures_and_their_copies(api: Json) -> None:
    (saved,) = (key for key, node in api.items() if node["class_type"] == "SaveImage")
    image = api[saved]["inputs"]["images"]
    api["again"] = {"class_type": "PreviewImage", "inputs": {"images": image}}
    api["bad"] = {"class_type": "PreviewImage", "inputs": {"images": ["nowhere", 0]}}
    workflow, problems = workflow_of(api, "the graph")
    assert workflow is not None
    assert [output.node for output in workflow.outputs] == [saved]
    assert workflow.copies == {"again": saved}
    assert "nowhere" in problems["bad"][0]
    assert set(json.loads(workflow.graph)) >= {saved, "again"}
    assert workflow_of(api, "the graph", ["bad"])[0] is None
    with pytest.raises(UsageError, match=r"^the graph: has no SaveImage"):
        workflow_of({"1": {"class_type": "CLIPTextEncode", "inputs": {}}}, "the graph")
    for strange in ({}, {"1": 3}, {"1": {"class_type": 3}}, {"nodes": []}):
        with pytest.raises(UsageError, match=r"^the graph: is not a graph"):
            workflow_of(strange, "the graph")
