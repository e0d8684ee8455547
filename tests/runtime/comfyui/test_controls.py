"""ControlNets of workflows: what each side of a sampler follows, what is refused, and graphs that are written."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime.comfyui.checks import experts
from sdxl_trt.runtime.comfyui.controls import control_uses
from sdxl_trt.runtime.comfyui.reader import read_workflow
from sdxl_trt.runtime.comfyui.requests import check_workflow, load_image, pair_request
from sdxl_trt.runtime.controls.use import ControlUse
from sdxl_trt.runtime.images.inputs import InputPicture, read_input
from sdxl_trt.runtime.pipeline.pipeline import open_bundle
from sdxl_trt.runtime.request.request import Request

Graph = dict[str, Any]
Uses = Callable[[Graph], tuple[ControlUse, ...]]


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def _graph(**more: Any) -> Graph:
    sampler = _node(
        "KSampler", model=["1", 0], seed=5, steps=3, cfg=4.0, sampler_name="euler", scheduler="normal",
        positive=["2", 0], negative=["3", 0], latent_image=["4", 0], denoise=1.0,
    )  # fmt: skip
    return {
        "1": _node("CheckpointLoaderSimple", ckpt_name="base.safetensors"),
        "2": _node("CLIPTextEncode", clip=["1", 1], text="a star"),
        "3": _node("CLIPTextEncode", clip=["1", 1], text=""),
        "4": _node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "5": _node("ControlNetLoader", control_net_name="nets/Edges.safetensors"),
        "6": _node("ControlNetLoader", control_net_name="poses.safetensors"), "7": _node("LoadImage", image="in.png"),
        "9": sampler, "10": _node("VAEDecode", samples=["9", 0], vae=["1", 2]),
        "11": _node("SaveImage", images=["10", 0], filename_prefix="x"),
    } | more  # fmt: skip


def _advanced(positive: str, negative: str, net: str = "5", **inputs: Any) -> Graph:
    return _node("ControlNetApplyAdvanced", positive=[positive, 0], negative=[negative, int(negative == "20")],
                 control_net=[net, 0], image=["7", 0], **inputs)  # fmt: skip


def _linked(graph: Graph, positive: Any, negative: Any) -> Graph:
    changed = copy.deepcopy(graph)
    changed["9"]["inputs"] |= {"positive": positive, "negative": negative}
    return changed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 80, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    return tmp_path


@pytest.fixture
def uses(controlled: Path, folder: Path) -> Uses:
    """Return a function from a graph to what its sampler follows."""

    def find(graph: Graph) -> tuple[ControlUse, ...]:
        (folder / "graph.json").write_text(json.dumps(graph))
        workflow, manifest = read_workflow(folder / "graph.json"), read_bundle(controlled).manifest
        check_workflow(workflow, manifest)
        return control_uses(workflow.samplings[0], manifest, lambda loaded: load_image(loaded, folder))

    return find


def _told(uses: tuple[ControlUse, ...]) -> list[tuple[Any, ...]]:
    return [(use.net, use.scale, use.start, use.end, use.side) for use in uses]


def test_the_simple_node_counts_for_both_sides(uses: Uses) -> None:
    apply = _node("ControlNetApply", conditioning=["2", 0], control_net=["5", 0], image=["7", 0], strength=0.7)
    assert _told(uses(_linked(_graph(**{"20": apply}), ["20", 0], ["3", 0]))) == [("edges", 0.7, 0.0, 1.0, "both")]


def test_the_advanced_node_counts_for_the_sides_that_it_is_linked_to(uses: Uses) -> None:
    apply = _advanced("2", "3", strength=0.7, start_percent=0.125, end_percent=0.75)
    graph = _graph(**{"20": apply})
    told = ("edges", 0.7, 0.125, 0.75)
    assert _told(uses(_linked(graph, ["20", 0], ["20", 1]))) == [(*told, "both")]
    assert _told(uses(_linked(graph, ["20", 0], ["3", 0]))) == [(*told, "positive")]
    assert _told(uses(_linked(graph, ["2", 0], ["20", 1]))) == [(*told, "negative")]


def test_nodes_in_a_row_are_several_controlnets(uses: Uses) -> None:
    graph = _graph(**{"20": _advanced("2", "3", strength=0.7), "21": _advanced("20", "20", "6", strength=0.25)})
    assert _told(uses(_linked(graph, ["21", 0], ["21", 1]))) == [
        ("edges", 0.7, 0.0, 1.0, "both"), ("poses", 0.25, 0.0, 1.0, "both"),
    ]  # fmt: skip


def test_a_strength_of_zero_applies_nothing(uses: Uses) -> None:
    graph = _graph(**{"20": _advanced("2", "3", strength=0.0)})
    assert uses(_linked(graph, ["20", 0], ["20", 1])) == ()


def test_a_scaled_picture_is_the_controlnet_s(uses: Uses) -> None:
    scaled = _node("ImageScale", image=["7", 0], upscale_method="nearest-exact", width=40, height=24, crop="disabled")
    graph = _graph(**{"8": scaled, "20": _advanced("2", "3") | {}})
    graph["20"]["inputs"]["image"] = ["8", 0]
    (use,) = uses(_linked(graph, ["20", 0], ["20", 1]))
    assert isinstance(use.picture, InputPicture)
    assert use.picture.size == (24, 40)
    assert use.picture.name == "in.png"


REFUSED: list[tuple[Graph, Any, str]] = [
    ({"20": _advanced("2", "3"), "21": _advanced("20", "20", "5", strength=0.5)}, "21",
     "node 21: applies the ControlNet 'edges', which another node applies too"),
    ({"20": _advanced("2", "3"), "5": _node("ControlNetLoader", control_net_name="depth.safetensors")}, "20",
     "node 20: the bundle has no ControlNet 'depth.safetensors'; it has edges, poses"),
    ({"20": _advanced("2", "3"), "5": _node("DiffControlNetLoader", model=["1", 0], control_net_name="e")}, "20",
     "node 5 (DiffControlNetLoader): is not supported, where CONTROL_NET is expected"),
    ({"20": _advanced("2", "3", "8"), "8": _node("SetUnionControlNetType", control_net=["5", 0], type="auto")}, "20",
     "node 8 (SetUnionControlNetType): is not supported, where CONTROL_NET is expected"),
    ({"20": _advanced("2", "3", strength=11.0)}, "20", "strength 11.0 is outside 0 to 10"),
    ({"20": _advanced("2", "3"), "7": _node("LoadImage", image="gone.png")}, "20",
     "node 7 (LoadImage): 'gone.png' is not in the workflow's folder"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "last", "message"), REFUSED, ids=[message[:40] for *_, message in REFUSED])
def test_what_is_not_supported_is_refused_in_a_line(uses: Uses, more: Graph, last: str, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        uses(_linked(_graph(**more), [last, 0], [last, 1]))
    assert message in str(refused.value)


def test_a_controlnet_on_the_refiner_is_refused(controlled: Path, folder: Path) -> None:
    graph = _linked(_graph(**{"20": _advanced("2", "3")}), ["20", 0], ["20", 1])
    graph["1"]["inputs"]["ckpt_name"] = "a_refiner.safetensors"
    (folder / "graph.json").write_text(json.dumps(graph))
    workflow, manifest = read_workflow(folder / "graph.json"), read_bundle(controlled).manifest
    assert set(experts(workflow, manifest).values()) == {"refiner"}
    with pytest.raises(UsageError, match="node 20: applies a ControlNet to the refiner, but ControlNets are for the"):
        check_workflow(workflow, manifest)


def test_a_run_writes_the_graph_that_repeats_it(controlled: Path, folder: Path) -> None:
    """The picture is cropped to its centre and scaled to the nearest pixels, whoever asks for it."""
    use = ControlUse(read_input(folder / "in.png"), 0.5, 0.125, 0.75, "poses")
    request = Request("a star", negative="", seed=5, steps=3, guidance=4.0, width=64, height=64, handoff=None,
                      compat="comfyui", controls=(use,))  # fmt: skip
    with open_bundle(controlled, provider="ort-cpu", residency="resident") as pipeline:
        (picture,) = pipeline.generate(request)
        assert picture.graph is not None
        kinds = [node["class_type"] for node in picture.graph.values()]
        assert kinds.count("ControlNetApplyAdvanced") == kinds.count("ControlNetLoader") == 1
        (folder / "graph.json").write_text(json.dumps(picture.graph))
        workflow = read_workflow(folder / "graph.json")
        found = check_workflow(workflow, pipeline.manifest)
        again = pair_request(workflow, pipeline.manifest, found, folder)
        assert again is not None
        assert _told(again.controls) == [("poses", 0.5, 0.125, 0.75, "both")]
        (repeated,) = pipeline.generate(again)
    assert np.array_equal(repeated.latents, picture.latents)
    (control,) = picture.metadata["controls"]
    assert (control["name"], control["net"], control["scale"]) == ("in.png", "poses", 0.5)
