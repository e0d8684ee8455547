"""LoRAs from the request to the picture on the embedded pair: options, prompts, records, --from, workflows, chains."""

import json
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from sdxl_trt.engines.bundle import LoraRecord
from sdxl_trt.engines.errors import IncompatibleError, UsageError
from sdxl_trt.engines.host import sha256_file
from sdxl_trt.runtime import Pipeline, Request, open_bundle
from sdxl_trt.runtime.adapters.use import LoraUse
from sdxl_trt.runtime.cli import generate
from sdxl_trt.runtime.cli.options import make_parser, stated_settings
from sdxl_trt.runtime.cli.repeat import repeated
from sdxl_trt.runtime.cli.series import Series
from sdxl_trt.runtime.comfyui.loras import LoraFiles
from sdxl_trt.runtime.comfyui.reader import read_workflow
from sdxl_trt.runtime.comfyui.requests import check_workflow, pair_request
from sdxl_trt.runtime.comfyui.workflow import LoraNode
from sdxl_trt.runtime.comfyui.writer import write_workflow
from sdxl_trt.runtime.images.files import PARAMETERS, read_texts
from sdxl_trt.runtime.pipeline.batch import Batch
from sdxl_trt.runtime.pipeline.chain import Chain
from sdxl_trt.runtime.pipeline.record import finish, read_settings

MakeLora = Callable[..., Path]
SMALL = Request("a red star", seed=3, steps=1, width=64, height=64, handoff=None)
Json = dict[str, Any]


@pytest.fixture(scope="module")
def opened() -> Iterator[Pipeline]:
    with open_bundle(residency="resident") as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def folder(make_lora: MakeLora, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("loras")
    make_lora(root / "ink.safetensors")
    make_lora(root / "style" / "pen.safetensors", seed=1)
    make_lora(root / "own.safetensors", "unet", seed=2, refiner=True)
    return root


def _latents(pipeline: Pipeline, request: Request) -> Any:
    for _ in pipeline.generate(request):
        pass
    assert pipeline.run is not None
    return pipeline.run.final


@pytest.fixture(scope="module")
def drawn(opened: Pipeline, folder: Path) -> Any:
    """Return a picture with a LoRA, and its latents."""
    (picture,) = opened.generate(replace(SMALL, prompt="a red star <lora:ink:0.25:0.5>", lora_dir=folder))
    assert opened.run is not None
    return picture, opened.run.final


def test_a_lora_changes_the_picture(opened: Pipeline, drawn: Any) -> None:
    assert np.abs(drawn[1] - _latents(opened, SMALL)).max() > 1e-3


@pytest.mark.parametrize("given", [{"prompt": "a star <lora:ink>"}, {"refiner_loras": (LoraUse("own"),)}])
def test_a_provider_that_takes_no_loras_refuses_them_before_anything_is_loaded(given: Any, folder: Path) -> None:
    with open_bundle(provider="ort-tensorrt") as pipeline:
        requests = [SMALL, replace(SMALL, handoff=0.5, steps=2, lora_dir=folder, **given)]
        with pytest.raises(IncompatibleError, match="TensorRT compiles the weights into its engines"):
            Batch(pipeline, requests)
        assert pipeline.pool.loads == []


def _repeated(picture: Any, path: Path, *options: str) -> Namespace:
    picture.save(path)
    return repeated(["--from", str(path), *options])


def test_a_picture_with_loras_is_made_again_from_its_record(
    opened: Pipeline, folder: Path, drawn: Any, tmp_path: Path
) -> None:
    picture = drawn[0]
    path = tmp_path / "star.png"
    arguments = _repeated(picture, path, "--lora-dir", str(folder))
    request = Request(**stated_settings(arguments), lora_dir=arguments.lora_dir)
    assert request.prompt == "a red star "
    assert request.loras == (LoraUse(str(folder / "ink.safetensors"), 0.5, 0.25),)
    first = replace(SMALL, prompt="a red star <lora:ink:0.25:0.5>", lora_dir=folder)
    made, again = (opened.start(each).run.request for each in (first, request))
    assert (again.loras, again.sides, again.lora_facts) == (made.loras, made.sides, made.lora_facts)
    text = read_texts(path)[PARAMETERS]
    fact = read_settings(path).loras[0]
    assert text.splitlines()[0] == "a red star  <lora:ink:0.25:0.5>"
    assert f'Lora hashes: "ink: {fact.short_hash}"' in text
    assert str(folder) not in json.dumps(read_texts(path))


def test_the_loras_of_a_record_are_found_by_name_and_digest(
    folder: Path, drawn: Any, make_lora: MakeLora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = tmp_path / "star.png"
    with pytest.raises(
        UsageError, match=r"was made with the LoRA 'ink.safetensors', which is not beside it as it was;"
    ):
        _repeated(drawn[0], path)
    make_lora(tmp_path / "elsewhere" / "ink.safetensors", seed=5)
    with pytest.raises(UsageError, match=r"'ink.safetensors'.*--lora-dir DIR, or leave it out with --lora none"):
        _repeated(drawn[0], path)
    assert _repeated(drawn[0], path, "--lora", "other.safetensors:2").loras == [LoraUse("other.safetensors", 2.0)]
    assert stated_settings(_repeated(drawn[0], path, "--lora", "none"))["loras"] == ()
    for place in (tmp_path / "elsewhere", tmp_path):
        shutil.copy(folder / "ink.safetensors", place)
        found = _repeated(drawn[0], path).loras
        assert [Path(use.path).read_bytes() for use in found] == [(folder / "ink.safetensors").read_bytes()]
        (place / "ink.safetensors").unlink()
    make_lora(tmp_path / "many" / "ink.safetensors", seed=5)
    shutil.copy(folder / "ink.safetensors", tmp_path / "many" / "b.safetensors")
    (tmp_path / "many" / "sub").mkdir()
    shutil.move(tmp_path / "many" / "b.safetensors", tmp_path / "many" / "sub" / "ink.safetensors")
    assert _repeated(drawn[0], path, "--lora-dir", str(tmp_path / "many")).loras[0].path.endswith("sub/ink.safetensors")


def _workflow(graph: Mapping[str, Any], pipeline: Pipeline, tmp_path: Path, folder: Path | None = None) -> Request:
    (tmp_path / "graph.json").write_text(json.dumps(graph))
    workflow, files = read_workflow(tmp_path / "graph.json"), LoraFiles(folder)
    request = pair_request(workflow, pipeline.manifest, check_workflow(workflow, pipeline.manifest, files), None, files)
    assert request is not None
    return request


def test_a_graph_with_loras_is_written_and_read_back(opened: Pipeline, folder: Path, tmp_path: Path) -> None:
    request = replace(SMALL, compat="comfyui", loras=(LoraUse("ink", 0.5, 0.25), LoraUse("pen", -1.0)), lora_dir=folder,
                      steps=2, handoff=0.5, refiner_loras=(LoraUse("own", 0.75),))  # fmt: skip
    (picture,) = opened.generate(request)
    assert picture.graph is not None
    loaders = [node["inputs"] for node in picture.graph.values() if node["class_type"] == "LoraLoader"]
    assert [(each["lora_name"], each["strength_model"], each["strength_clip"]) for each in loaders] == [
        ("ink.safetensors", 0.5, 0.25), ("style/pen.safetensors", -1.0, -1.0), ("own.safetensors", 0.75, 0.75),
    ]  # fmt: skip
    again = _workflow(picture.graph, opened, tmp_path, folder)
    assert [Path(use.path).name for use in again.loras] == ["ink.safetensors", "pen.safetensors"]
    made, read = (opened.start(each).run.request for each in (request, again))
    assert (read.loras, read.lora_facts) == (made.loras, made.lora_facts)
    assert [side.prompt for stage in read.sides.values() for side in stage] == [
        side.prompt for stage in made.sides.values() for side in stage
    ]
    with pytest.raises(
        UsageError, match=r"node 3 \(LoraLoader\): LoRA ink.safetensors at strength 0.5.*--lora-dir DIR"
    ):
        _workflow(picture.graph, opened, tmp_path)
    with pytest.raises(UsageError, match=r"node 3 \(LoraLoader\): .*ink.safetensors; check the name"):
        _workflow(picture.graph, opened, tmp_path, folder / "style")


def test_a_written_graph_never_names_another_file(
    opened: Pipeline, folder: Path, make_lora: MakeLora, tmp_path: Path
) -> None:
    def names(*paths: Path, lora_dir: Path | None = None) -> list[str] | None:
        loras = tuple(LoraUse(str(path)) for path in paths)
        asked = replace(SMALL, compat="comfyui", loras=loras, lora_dir=lora_dir)
        graph = write_workflow(asked, opened.start(asked).run.request, opened.manifest)
        return graph and [node["inputs"]["lora_name"] for node in graph.values() if node["class_type"] == "LoraLoader"]

    ink, other = folder / "ink.safetensors", make_lora(tmp_path / "ink.safetensors", seed=7)
    assert names(ink, ink) == ["ink.safetensors"] * 2
    assert names(ink, other) is None
    assert names(other, lora_dir=folder) is None  # ink.safetensors is another one there
    assert names(other, lora_dir=folder / "style") == ["ink.safetensors"]
    assert names(folder / "style" / ".." / "ink.safetensors", lora_dir=folder / "style") == ["ink.safetensors"]
    make_lora(tmp_path / "a" / "ink.safetensors", seed=8)
    assert names(other, tmp_path / "a" / "ink.safetensors", lora_dir=tmp_path) == ["ink.safetensors",
                                                                                  "a/ink.safetensors"]  # fmt: skip


def _graph(opened: Pipeline) -> Json:
    """Return the graph of a base alone in ComfyUI's form: node 1 is the checkpoint."""
    request = replace(SMALL, compat="comfyui", negative="bad")
    job = opened.start(request)
    graph = write_workflow(request, job.run.request, opened.manifest)
    assert graph is not None
    return dict(graph)


def test_each_prompt_is_encoded_with_the_loras_of_its_own_clip(opened: Pipeline, folder: Path, tmp_path: Path) -> None:
    """The model has one LoRA, the positive prompt's CLIP another, and the negative prompt's none."""
    graph = _graph(opened)
    sampler = next(node["inputs"] for node in graph.values() if node["class_type"] == "KSamplerAdvanced")
    graph["m"] = {"class_type": "LoraLoaderModelOnly", "inputs": {
        "model": ["1", 0], "lora_name": "style\\pen.safetensors", "strength_model": 0.5}}  # fmt: skip
    graph["c"] = {"class_type": "LoraLoader", "inputs": {
        "model": ["1", 0], "clip": ["1", 1], "lora_name": "ink.safetensors", "strength_model": 9.0,
        "strength_clip": 0.75}}  # fmt: skip
    graph[sampler["positive"][0]]["inputs"]["clip"] = ["c", 1]
    sampler["model"] = ["m", 0]
    job = opened.start(_workflow(graph, opened, tmp_path, folder))
    resolved = job.run.request
    assert [(each.lora.name, each.scale, each.on("text_encoder")) for each in resolved.loras["base"]] == [
        ("pen.safetensors", 0.5, 0.0), ("ink.safetensors", 0.0, 0.75),
    ]  # fmt: skip
    positive, negative = (side.prompt.loras for side in resolved.sides["base"])
    assert (positive, negative) == (None, ())  # None: the stage's
    list(opened.encode([job]))
    ink = replace(SMALL, compat="comfyui", negative="bad", loras=(LoraUse(str(folder / "ink.safetensors"), 0.75),))
    whole, plain = opened.start(ink), opened.start(replace(ink, loras=()))
    list(opened.encode([whole, plain]))
    for number, other in ((0, whole), (1, plain)):
        np.testing.assert_array_equal(job.embeds["base"][number][0].hidden, other.embeds["base"][number][0].hidden)
        np.testing.assert_array_equal(job.embeds["base"][number][0].pooled, other.embeds["base"][number][0].pooled)
    assert not np.array_equal(whole.embeds["base"][1][0].hidden, plain.embeds["base"][1][0].hidden)


def test_a_loader_of_strength_0_needs_no_file(opened: Pipeline, tmp_path: Path) -> None:
    graph = _graph(opened)
    graph["m"] = {"class_type": "LoraLoaderModelOnly",
                  "inputs": {"model": ["1", 0], "lora_name": "gone.safetensors", "strength_model": 0}}  # fmt: skip
    next(node["inputs"] for node in graph.values() if node["class_type"] == "KSamplerAdvanced")["model"] = ["m", 0]
    assert _workflow(graph, opened, tmp_path).loras == ()


def test_every_sampler_of_a_chain_has_its_own_loras(opened: Pipeline, folder: Path, tmp_path: Path) -> None:
    graph = _graph(opened)
    [key] = [key for key, node in graph.items() if node["class_type"] == "KSamplerAdvanced"]
    first = graph[key]["inputs"]
    graph["m"] = {"class_type": "LoraLoaderModelOnly",
                  "inputs": {"model": ["1", 0], "lora_name": "ink.safetensors", "strength_model": 0.5}}  # fmt: skip
    second = {**first, "latent_image": [key, 0], "model": ["m", 0], "steps": 3}
    graph["s"] = {"class_type": "KSamplerAdvanced", "inputs": second}
    next(node["inputs"] for node in graph.values() if node["class_type"] == "VAEDecode")["samples"] = ["s", 0]
    (tmp_path / "graph.json").write_text(json.dumps(graph))
    workflow, files = read_workflow(tmp_path / "graph.json"), LoraFiles(folder)
    found = check_workflow(workflow, opened.manifest, files)
    chain = Chain(opened, workflow, found, tmp_path, lambda request: request, files)
    own = {
        node: [each.lora.name for each in job.run.request.loras.get("base", ())] for node, job in chain._jobs.items()
    }
    assert own == {key: [], "s": ["ink.safetensors"]}


def _with_loaders(opened: Pipeline, *loras: tuple[str, float], models_only: bool = False) -> Json:
    """Return the graph of a base alone with loaders one after the other, as (name, both strengths)."""
    graph = _graph(opened)
    model, clip = ["1", 0], ["1", 1]
    for number, (name, scale) in enumerate(loras):
        kind = "LoraLoaderModelOnly" if models_only else "LoraLoader"
        clips = {} if models_only else {"clip": clip, "strength_clip": scale}
        inputs = {"model": model, "lora_name": name, "strength_model": scale} | clips
        graph[f"l{number}"] = {"class_type": kind, "inputs": inputs}
        model, clip = [f"l{number}", 0], [f"l{number}", 1]
    for node in graph.values():
        if node["class_type"] == "KSamplerAdvanced":
            node["inputs"]["model"] = model
        if "clip" in node["inputs"] and not node["class_type"].startswith("Lora") and not models_only:
            node["inputs"]["clip"] = clip
    return graph


def test_two_files_of_one_name_are_told_apart_by_their_paths(
    opened: Pipeline, make_lora: MakeLora, tmp_path: Path
) -> None:
    loras = tmp_path / "loras"
    first, second = (make_lora(loras / name / "ink.safetensors", seed=seed) for seed, name in enumerate("ab"))
    request = _workflow(_with_loaders(opened, ("a/ink.safetensors", 1.0), ("b/ink.safetensors", 0.5)), opened,
                        tmp_path, loras)  # fmt: skip
    picture = finish(opened.start(request).run, 0, np.zeros((64, 64, 3), np.uint8))
    arguments = _repeated(picture, tmp_path / "x.png", "--lora-dir", str(loras))
    work, _ = generate._work(generate._workflow(arguments), arguments, opened)
    assert [each.lora.path for each in work.runs[0].request.loras["base"]] == [first, second]
    shutil.copy(first, tmp_path)
    shutil.copy(second, tmp_path / "b.safetensors")
    second.rename(tmp_path / "kept")
    with pytest.raises(UsageError, match=r"made with the LoRA 'ink.safetensors'"):
        _repeated(picture, tmp_path / "x.png", "--lora-dir", str(loras))
    shutil.copy(first, second)
    first.unlink()
    (tmp_path / "kept").rename(first)  # the two have changed places
    arguments = _repeated(picture, tmp_path / "x.png", "--lora-dir", str(loras))
    with pytest.raises(UsageError, match="was made with other LoRAs"):
        generate._work(generate._workflow(arguments), arguments, opened)


def test_a_file_with_the_name_of_a_fused_one_is_another_lora(
    opened: Pipeline, make_lora: MakeLora, tmp_path: Path
) -> None:
    """Each loader means its own file if the folder has it; a loader without a file means the fused LoRA."""
    fused, other = make_lora(tmp_path / "ink.safetensors"), make_lora(tmp_path / "b" / "ink.safetensors", seed=1)
    record = LoraRecord(name="ink.safetensors", sha256=sha256_file(fused), scale=0.8)
    manifest = msgspec.structs.replace(opened.manifest, loras=(record,))
    files = LoraFiles(tmp_path).beside(manifest)
    nodes = tuple(LoraNode(name, 0.8) for name in ("ink.safetensors", "b/ink.safetensors", "gone/ink.safetensors"))
    assert [use.path for use in files.uses(nodes)] == [str(other)]
    (tmp_path / "graph.json").write_text(json.dumps(_with_loaders(opened, ("ink.safetensors", 0.8),
                                                                  ("b/ink.safetensors", 0.8))))  # fmt: skip
    check_workflow(read_workflow(tmp_path / "graph.json"), manifest, LoraFiles(tmp_path))
    with pytest.raises(UsageError, match=r"at strength 1.6 is not in the bundle"):
        check_workflow(read_workflow(tmp_path / "graph.json"), manifest)


def test_a_picture_of_a_chain_records_the_files_of_all_its_samplers(
    opened: Pipeline, folder: Path, make_lora: MakeLora, tmp_path: Path
) -> None:
    """The last sampler has no LoRA; the picture of another output has its own."""
    Image.new("L", (64, 64)).save(tmp_path / "mask.png")
    graph = _graph(opened)
    [key] = [key for key, node in graph.items() if node["class_type"] == "KSamplerAdvanced"]
    [save] = [node for node in graph.values() if node["class_type"] == "SaveImage"]
    [decode] = [node for node in graph.values() if node["class_type"] == "VAEDecode"]
    graph["m"] = {"class_type": "LoraLoaderModelOnly",
                  "inputs": {"model": ["1", 0], "lora_name": "ink.safetensors", "strength_model": 0.5}}  # fmt: skip
    second = {**graph[key]["inputs"], "latent_image": [key, 0], "steps": 3}
    graph["i"] = {"class_type": "LoadImageMask", "inputs": {"image": "mask.png", "channel": "red"}}
    latents = graph[key]["inputs"]["latent_image"]
    graph["n"] = {"class_type": "SetLatentNoiseMask", "inputs": {"samples": latents, "mask": ["i", 0]}}
    graph[key]["inputs"] |= {"model": ["m", 0], "latent_image": ["n", 0]}
    graph["s"] = {"class_type": "KSamplerAdvanced", "inputs": second}
    decode["inputs"]["samples"] = ["s", 0]
    alone = {**second, "latent_image": latents}
    graph["a"] = {"class_type": "KSamplerAdvanced", "inputs": alone}
    graph["d"] = {"class_type": "VAEDecode", "inputs": {**decode["inputs"], "samples": ["a", 0]}}
    graph["o"] = {"class_type": "SaveImage", "inputs": {**save["inputs"], "images": ["d", 0]}}
    (tmp_path / "graph.json").write_text(json.dumps(graph))
    workflow, files = read_workflow(tmp_path / "graph.json"), LoraFiles(folder)
    chain = Chain(opened, workflow, check_workflow(workflow, opened.manifest, files), tmp_path, lambda one: one, files)
    unit = np.zeros((1, 3, 64, 64), np.float32)
    made, plain = (chain._finished(number, 0, unit) for number in (0, 1))
    assert [(each["name"], each["scale"]) for each in made.metadata["loras"]] == [("ink.safetensors", 0.5)]
    assert [each["name"] for each in made.metadata["files"]] == ["mask.png"]
    assert plain.metadata.keys().isdisjoint({"loras", "files"})
    with pytest.raises(UsageError, match=r"made with the LoRA 'ink.safetensors', which is not beside it as it was"):
        _repeated(made, tmp_path / "x.png")
    shutil.copy(folder / "ink.safetensors", tmp_path)
    arguments = _repeated(made, tmp_path / "x.png")
    work, _ = generate._work(generate._workflow(arguments), arguments, opened)
    assert [len(run.request.loras.get("base", ())) for run in work.runs_of(0)] == [1, 0]
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    with pytest.raises(UsageError, match=r"x.png: was made with other pictures or masks than its workflow finds now"):
        generate._work(generate._workflow(arguments), arguments, opened)


def test_a_workflow_says_that_its_tags_are_words(opened: Pipeline, folder: Path, tmp_path: Path) -> None:
    graph = _graph(opened)
    for node in graph.values():
        node["inputs"] |= {"text_l": "a star <lora:ink:1>"} if "text_l" in node["inputs"] else {}
    request = replace(_workflow(graph, opened, tmp_path, folder), lora_dir=folder)
    resolved = opened.start(request).run.request
    assert not resolved.loras
    (note,) = resolved.notes
    assert note.startswith("a prompt of the workflow has '<lora:ink:1>', which is read as words, as in ComfyUI; use a")


def test_every_line_of_a_file_of_prompts_has_its_own_loras(opened: Pipeline, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a star\na star <lora:ink:0.5>\na star <lora:pen:1>\n")
    arguments = make_parser().parse_args(["--prompts", str(tmp_path / "prompts.txt"), "--lora-dir", str(folder)])
    series = Series(replace(SMALL, prompt="", lora_dir=folder), arguments)
    batch = Batch(opened, series.requests)
    assert [[each.lora.name for each in run.request.loras.get("base", ())] for run in batch.runs] == [
        [], ["ink.safetensors"], ["pen.safetensors"],
    ]  # fmt: skip
    assert [run.request.prompt.text for run in batch.runs] == ["a star", "a star ", "a star "]


def test_a_note_is_said_once(folder: Path, unloaded: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    request = replace(SMALL, steps=2, handoff=0.5, loras=(LoraUse(str(folder / "ink.safetensors")),))
    for seed in range(3):
        unloaded.start(replace(request, seed=seed))
    assert caplog.text.count("the refiner was not trained with this LoRA") == 1
