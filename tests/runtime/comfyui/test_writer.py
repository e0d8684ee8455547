"""Requests as ComfyUI graphs: a written graph is read as the same run, and an incomplete graph is not written."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.engines.bundle.manifest import LoraRecord, Manifest
from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime.comfyui.reader import read_workflow
from sdxl_trt.runtime.comfyui.requests import check_workflow, pair_request
from sdxl_trt.runtime.comfyui.writer import write_workflow
from sdxl_trt.runtime.images import InputMask
from sdxl_trt.runtime.images.inputs import InputPicture, read_input
from sdxl_trt.runtime.request.request import Request
from sdxl_trt.runtime.request.resolve import ResolvedRequest, resolve_request
from sdxl_trt.runtime.request.side import Side

FOX = Request("a (red:1.3) fox", compat="comfyui", steps=10, seed=5, width=64, height=32)


@pytest.fixture(scope="module")
def manifest(pairs: Callable[[str], Any]) -> Manifest:
    manifest = read_bundle(pairs("outline").bundle).manifest
    return msgspec.structs.replace(manifest, loras=(LoraRecord(name="ink.safetensors", sha256="0" * 64, scale=0.8),))


def _written(request: Request, manifest: Manifest) -> Any:
    return write_workflow(request, resolve_request(request, manifest), manifest)


def _read(graph: Any, manifest: Manifest, folder: Path) -> Request:
    (folder / "graph.json").write_text(json.dumps(graph))
    workflow = read_workflow(folder / "graph.json")
    request = pair_request(workflow, manifest, check_workflow(workflow, manifest), folder)
    assert request is not None
    return request


def _run_of(request: ResolvedRequest) -> dict[str, Any]:
    """Return everything in a request that determines its latents."""
    grid = request.schedule.sigmas
    run: dict[str, Any] = {
        "grid": grid.tolist(), "size": (request.width, request.height), "seeds": request.seeds,
        "final": request.final_scale, "refined": request.uses_refiner,
    }  # fmt: skip
    for stage in ("base", "refiner") if request.uses_refiner else ("base",):
        sampler, part = request.denoising_of(stage)  # type: ignore[arg-type]
        adds = part.add_noise and part.steps > 0
        run[stage] = (sampler, request.guidance_of(stage), part.sigmas(grid).tolist(), adds)  # type: ignore[arg-type]
        for sign, side in enumerate(request.sides[stage]):  # type: ignore[index]
            micro = side.micro
            sizes: tuple[Any, ...] = (micro.original_size, micro.crop, micro.target_size, side.prompt.text_2)
            if stage == "refiner":
                # It has one text and no target size.
                sizes = (micro.original_size, micro.crop, (micro.aesthetic_score, micro.negative_aesthetic_score)[sign])
            run[f"{stage} {sign}"] = (side.prompt.text, side.zeroed, *sizes)
    return run


SIDES = st.builds(
    Side, text=st.text(max_size=5), text_2=st.text(max_size=5), zeroed=st.booleans(),
    original_size=st.none() | st.tuples(st.integers(0, 4096), st.integers(0, 4096)),
    target_size=st.none() | st.tuples(st.integers(0, 4096), st.integers(0, 4096)),
    aesthetic_score=st.none() | st.floats(-10, 10),
)  # fmt: skip
STEPS = st.none() | st.integers(0, 12)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], derandomize=True, max_examples=80
)
@given(data=st.data())
def test_a_written_graph_is_read_as_the_same_run(manifest: Manifest, tmp_path: Path, data: st.DataObject) -> None:
    draw = data.draw
    request = replace(
        FOX,
        negative=draw(st.none() | st.text(max_size=5)),
        sampler=draw(st.sampled_from(["euler", "dpmpp_2m", "euler_ancestral"])),
        refiner_sampler=draw(st.sampled_from([None, "heun", "lcm", "dpmpp_2m_sde"])),
        schedule=draw(st.sampled_from(["", "karras", "beta", "sgm_uniform"])),
        guidance=draw(st.floats(0, 20)),
        refiner_guidance=draw(st.none() | st.floats(0, 20)),
        aesthetic_score=draw(st.floats(0, 10)),
        count=draw(st.none() | st.integers(1, 3)),
        handoff=draw(st.sampled_from(["auto", None])),
        base_start_step=draw(st.integers(0, 12)),
        base_end_step=draw(STEPS),
        base_add_noise=draw(st.booleans()),
        leftover_noise=draw(st.none() | st.booleans()),
        refiner_end_step=draw(STEPS),
        refiner_add_noise=draw(st.booleans()),
        refiner_leftover_noise=draw(st.booleans()),
        refiner_seed=draw(st.none() | st.integers(0, 2**64 - 1)),
        base_sides=draw(st.none() | st.tuples(SIDES, SIDES)),
        original_size=draw(st.none() | st.just((96, 48))),
    )
    if request.handoff is not None:
        request = replace(request, refiner_start_step=draw(STEPS))
        if request.base_sides is not None:
            sides, seed = draw(st.tuples(SIDES, SIDES)), draw(st.integers(0, 9))
            request = replace(request, refiner_sides=sides, refiner_seed=seed)
    resolved = resolve_request(request, manifest)
    graph = write_workflow(request, resolved, manifest)
    if graph is not None:
        again = resolve_request(_read(graph, manifest, tmp_path), manifest)
        assert _run_of(again) == _run_of(resolved)
        if resolved.uses_refiner:
            # A refiner without a seed has the base's, and restarts its stream.
            assert again.refiner_seeds == (resolved.refiner_seeds or resolved.seeds)


def test_a_graph_names_checkpoints_and_loras(manifest: Manifest) -> None:
    graph = _written(FOX, manifest)
    kinds = [node["class_type"] for node in graph.values()]
    assert kinds.count("KSamplerAdvanced") == kinds.count("CheckpointLoaderSimple") == 2
    loaders = [node["inputs"] for node in graph.values() if node["class_type"].startswith("Lora")]
    assert [(each["lora_name"], each["strength_model"], each["strength_clip"]) for each in loaders] == [
        ("ink.safetensors", 0.8, 0.8)
    ]
    names = [node["inputs"]["ckpt_name"] for node in graph.values() if node["class_type"].startswith("Checkpoint")]
    assert names == ["base.safetensors", "refiner.safetensors"]
    own = _written(replace(FOX, checkpoints=("sdxl.ckpt", "fine.safetensors")), manifest)
    assert "fine.safetensors" in json.dumps(own)


def test_a_lora_has_the_strength_on_the_encoders_with_which_it_was_fused(manifest: Manifest) -> None:
    lora = msgspec.structs.replace(manifest.loras[0], text_scale=0.0)
    graph = _written(FOX, msgspec.structs.replace(manifest, loras=(lora,)))
    [loader] = [node["inputs"] for node in graph.values() if node["class_type"] == "LoraLoader"]
    assert (loader["strength_model"], loader["strength_clip"]) == (0.8, 0.0)


def test_every_link_points_to_an_earlier_node(manifest: Manifest) -> None:
    """ComfyUI's loader accepts any order, but other programs may read from top to bottom."""
    graph = _written(FOX, manifest)
    for number, node in graph.items():
        for value in node["inputs"].values():
            if isinstance(value, list):
                assert int(value[0]) < int(number)
                assert (len(value), type(value[1])) == (2, int)


@pytest.mark.parametrize(
    "change",
    [
        {"compat": "diffusers"}, {"clip_skip": 1}, {"guidance_rescale": 0.5}, {"guidance_interval": (0.0, 0.5)},
        {"tile": True}, {"latents": np.zeros((1, 4, 16, 32), np.float32)}, {"crop": (8, 0)},
        {"prediction_type": "v_prediction"}, {"cache": 2}, {"refiner_cache": 2},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_settings_that_no_node_has_are_not_written(manifest: Manifest, change: dict[str, Any]) -> None:
    assert _written(FOX, manifest) is not None
    assert _written(replace(FOX, **change), manifest) is None


@pytest.fixture
def image(tmp_path: Path) -> InputPicture:
    """Return a picture file in the folder in which the graph is read."""
    Image.new("RGB", (64, 32), (200, 30, 30)).save(tmp_path / "in.png")
    return read_input(tmp_path / "in.png")


BOTH = (Side(text="a", text_2="a", aesthetic_score=6.0), Side(text="", text_2="", aesthetic_score=2.0))
FROM_IMAGES: dict[str, dict[str, Any]] = {
    "base alone": {"strength": 0.5, "handoff": None},
    "batch": {"strength": 0.5, "handoff": None, "count": 2},
    "refiner alone": {"strength": 0.4, "refine": True},
    "from a step": {"base_start_step": 6, "handoff_step": 8},
    "two strengths": {
        "strength": 0.6, "base_sides": BOTH, "refiner_sides": BOTH, "refiner_start_step": 0, "refiner_add_noise": True,
        "base_end_step": 10_000,
        "refiner_strength": 0.3, "refiner_seed": 3, "leftover_noise": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("change", FROM_IMAGES.values(), ids=FROM_IMAGES)
def test_a_run_from_a_picture_is_written_with_it(
    manifest: Manifest, image: InputPicture, tmp_path: Path, change: dict[str, Any]
) -> None:
    request = replace(FOX, width=None, height=None, image=image, **change)
    resolved = resolve_request(request, manifest)
    graph = write_workflow(request, resolved, manifest)
    assert graph is not None
    again = resolve_request(_read(graph, manifest, tmp_path), manifest)
    assert _run_of(again) == _run_of(resolved)
    assert (again.refiner_only, again.first.add_noise) == (resolved.refiner_only, resolved.first.add_noise)
    assert again.refiner_schedule.sigmas.tolist() == resolved.refiner_schedule.sigmas.tolist()
    assert again.image is not None
    assert (again.image.name, again.image.sha256, again.fit) == ("in.png", image.sha256, resolved.fit)


@pytest.mark.parametrize(
    "change",
    [{"width": 128}, {"image": np.zeros((32, 64, 3), np.uint8)}, {"image": np.zeros((1, 4, 16, 32), np.float32)},
     {"strength": 0.5, "handoff": "auto"}],
    ids=["scaled", "no file", "latents", "one grid for both"],
)  # fmt: skip
def test_a_start_that_differs_in_comfyui_is_not_written(
    manifest: Manifest, image: InputPicture, change: dict[str, Any]
) -> None:
    usual = {"image": image, "width": None, "height": None, "strength": 0.5, "handoff": None}
    assert _written(replace(FOX, **usual), manifest) is not None  # type: ignore[arg-type]
    assert _written(replace(FOX, **(usual | change)), manifest) is None  # type: ignore[arg-type]


def test_two_files_of_one_name_have_no_graph(manifest: Manifest, image: InputPicture, tmp_path: Path) -> None:
    pixels = np.full((32, 64), 255, np.uint8)
    usual = {"image": image, "width": None, "height": None, "strength": 0.5, "handoff": None}
    for mask, written in (
        (InputMask(pixels, "mask.png", "1" * 64), True),
        (InputMask(pixels, image.name, image.sha256), True),
        (InputMask(pixels, image.name, "1" * 64), False),
    ):
        request = replace(FOX, mask=mask, paste=False, **usual)  # type: ignore[arg-type]
        assert (_written(request, manifest) is not None) == written


def test_models_with_the_same_name_get_different_names(manifest: Manifest, tmp_path: Path) -> None:
    components = dict(manifest.components)
    source = msgspec.structs.replace(components["refiner_unet"].source, name="base/unet")
    components["refiner_unet"] = msgspec.structs.replace(components["refiner_unet"], source=source)
    alike = msgspec.structs.replace(manifest, components=components)
    assert _read(_written(FOX, alike), alike, tmp_path).refiner_sides is not None


def test_a_graph_that_was_changed_by_hand_is_checked(manifest: Manifest, tmp_path: Path) -> None:
    graph = _written(FOX, manifest)
    sampler = next(node for node in graph.values() if node["class_type"] == "KSamplerAdvanced")
    sampler["inputs"]["steps"] = 0
    with pytest.raises(UsageError, match="steps 0 is outside 1 to 10000"):
        _read(graph, manifest, tmp_path)


@pytest.mark.parametrize("change", [{"aesthetic_score": -1.0}, {"guidance": 101.0}, {"guidance": -1.0}])
def test_values_that_comfyui_refuses_are_not_written(manifest: Manifest, change: dict[str, Any]) -> None:
    assert _written(replace(FOX, **change), manifest) is None
