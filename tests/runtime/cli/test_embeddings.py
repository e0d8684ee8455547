"""Embeddings from the command line: found, recorded, repeated with --from, in workflows and files of prompts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from sdxl_trt.engines.bundle.bundle import read_bundle
from sdxl_trt.engines.host import sha256_file
from sdxl_trt.mini.embedded import bundle_path
from sdxl_trt.runtime.cli import series
from sdxl_trt.runtime.cli.generate import main as trt_generate
from sdxl_trt.runtime.images.files import SETTINGS, WORKFLOW
from sdxl_trt.runtime.pipeline import batch as batches
from sdxl_trt.runtime.pipeline.record import finish
from sdxl_trt.runtime.pipeline.run import Step

COMPONENTS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
SMALL = ["--steps", "1", "--width", "64", "--height", "64", "--seed", "1", "--no-refiner"]
OLD = Path(__file__).parents[2] / "format_1" / "bundle"


def _tensors(count: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    manifest, rng = read_bundle(bundle_path()).manifest, np.random.default_rng(seed)
    widths = {key: int(manifest.components[name].input("embeddings").shape[1]) for key, name in COMPONENTS.items()}
    return {key: rng.standard_normal((count, width), dtype=np.float32) for key, width in widths.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "embeddings"
    (root / "styles").mkdir(parents=True)
    save_file(_tensors(), root / "styles" / "ink.safetensors")
    save_file(_tensors(seed=1), root / "oil.safetensors")
    return root


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[Any]]:
    """Return a function that runs the command without engines and returns the resolved requests."""
    monkeypatch.chdir(tmp_path)
    seen: list[Any] = []

    def steps(self: Any) -> Any:
        seen[:] = [run.request for run in self.runs]
        return iter(())

    monkeypatch.setattr(batches.Batch, "steps", steps)
    monkeypatch.setattr(series.Series, "finish", lambda *_, **__: {})

    def run(*arguments: str | Path) -> list[Any]:
        seen.clear()
        assert trt_generate([*map(str, arguments), "--json"]) == 0
        return list(seen)

    return run


def _names(request: Any) -> list[str]:
    return [fact.name for fact in request.embeddings]


def _draw(*given: str) -> None:
    """Run the command, which draws a black picture with its own record."""

    def drawn(self: Any) -> Any:
        black = finish(self.runs[0], 0, np.zeros((64, 64, 3), np.uint8))
        yield 0, Step("decode", 1, 1, slice(0, 1), picture=black)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches.Batch, "steps", drawn)
        assert trt_generate([*given, *SMALL, "--json"]) == 0


@pytest.fixture
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a picture with an embedding in each mode: the command's own, but for its pixels."""
    root = tmp_path_factory.mktemp("pictures")
    save_file(_tensors(), root / "ink.safetensors")
    for compat in ("diffusers", "comfyui"):
        out = str(root / f"{compat}.png")
        given = ["a red star, embedding:ink", "--negative", "blurry", "--embedding-dir", str(root), "-o", out]
        _draw(*given, "--compat", compat)
    return {compat: root / f"{compat}.png" for compat in ("diffusers", "comfyui")}


def test_embeddings_are_recorded_by_name_and_digest(pictures: dict[str, Path]) -> None:
    for path in pictures.values():
        digest = sha256_file(path.with_name("ink.safetensors"))
        with Image.open(path) as image:
            settings = json.loads(image.text[SETTINGS])
        assert settings["embeddings"] == [{"name": "ink.safetensors", "sha256": digest}]
        assert str(path.parent) not in json.dumps(settings)


def test_a_picture_is_repeated_with_the_file_beside_it_in_this_folder_or_in_the_one_given(
    pictures: dict[str, Path], asked: Any, folder: Path, tmp_path: Path, fails: Any
) -> None:
    beside = pictures["diffusers"]
    assert _names(*asked("--from", beside)) == ["ink.safetensors"]
    alone = shutil.copy(beside, tmp_path / "alone.png")
    assert _names(*asked("--from", alone, "--embedding-dir", beside.parent)) == ["ink.safetensors"]
    shutil.copy(beside.with_name("ink.safetensors"), tmp_path / "ink.safetensors")
    shutil.rmtree(folder)  # which holds another of the name
    assert _names(*asked("--from", alone)) == ["ink.safetensors"]
    assert asked("--from", alone, "a fox")[0].embeddings == ()
    (tmp_path / "copies").mkdir()
    shutil.copy(tmp_path / "ink.safetensors", tmp_path / "copies")
    assert "embedding:ink: is the name of" in fails(trt_generate, ["--from", str(alone)], 2)
    shutil.rmtree(tmp_path / "copies")
    save_file(_tensors(seed=9), tmp_path / "ink.safetensors")
    line = fails(trt_generate, ["--from", str(alone)], 2)
    assert "was made with the embedding 'ink.safetensors', which is not beside it as it was; give the folder" in line
    line = fails(trt_generate, ["--from", str(alone), "--embedding-dir", str(tmp_path)], 2)
    assert f"which is not in {tmp_path} as it was" in line


def test_a_prompt_that_finds_another_embedding_of_the_name_is_refused(tmp_path: Path, asked: Any, fails: Any) -> None:
    for number, name in enumerate(("a", "keep")):
        (tmp_path / name).mkdir()
        save_file(_tensors(seed=number), tmp_path / name / "two.safetensors")
    out, embeddings = tmp_path / "out.png", ("--embedding-dir", str(tmp_path))
    _draw("a star, embedding:a\\two", *embeddings, "-o", str(out))
    assert _names(*asked("--from", out)) == ["two.safetensors"]  # a backslash names a folder too
    (tmp_path / "keep" / "two.safetensors").write_bytes((tmp_path / "a" / "two.safetensors").read_bytes())
    save_file(_tensors(seed=2), tmp_path / "a" / "two.safetensors")
    line = fails(trt_generate, ["--from", str(out), *embeddings, "-o", str(tmp_path / "again.png")], 2)
    assert "its prompt now finds another embedding 'two.safetensors' than the one it was made with" in line
    # A prompt that is given now may name whatever it likes.
    asked("--from", out, "a fox, embedding:a/two", *embeddings)


def test_a_folder_that_cannot_be_searched_is_passed_over_unless_it_was_given(
    pictures: dict[str, Path], asked: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, fails: Any
) -> None:
    apart, ink = tmp_path_factory.mktemp("apart"), pictures["diffusers"].with_name("ink.safetensors")
    alone = shutil.copy(pictures["diffusers"], apart / "alone.png")
    (apart / "ink.safetensors").symlink_to(ink)
    shutil.copy(ink, tmp_path / "ink.safetensors")
    assert _names(*asked("--from", alone)) == ["ink.safetensors"]
    line = fails(trt_generate, ["--from", str(alone), "--embedding-dir", str(apart)], 2)
    assert "is a symbolic link, which is not followed" in line


def test_a_workflow_keeps_its_words_and_finds_the_embeddings(
    pictures: dict[str, Path], asked: Any, folder: Path, tmp_path: Path
) -> None:
    with Image.open(pictures["comfyui"]) as image:
        graph = json.loads(image.text[WORKFLOW])
    texts = [node["inputs"]["text_g"] for node in graph.values() if "text_g" in node["inputs"]]
    assert texts == ["a red star, embedding:ink", "blurry"]
    (tmp_path / "x.json").write_text(json.dumps(graph))
    assert _names(*asked("--workflow", tmp_path / "x.json", "--embedding-dir", folder)) == ["ink.safetensors"]
    assert asked("--workflow", tmp_path / "x.json")[0].embeddings == ()  # left out, as ComfyUI does
    assert _names(*asked("--workflow", pictures["comfyui"], "--embedding-dir", folder)) == ["ink.safetensors"]


def test_every_prompt_of_a_file_has_its_own(asked: Any, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a fox embedding:ink\na fox\nembedding:oil embedding:styles/ink\n")
    requests = asked("--prompts", tmp_path / "prompts.txt", "--embedding-dir", folder)
    assert [_names(request) for request in requests] == [
        ["ink.safetensors"], [], ["ink.safetensors", "oil.safetensors"],
    ]  # fmt: skip


def test_a_sweep_of_a_prompt_with_embeddings(asked: Any, folder: Path) -> None:
    requests = asked("embedding:ink", "--negative", "embedding:oil", "--embedding-dir", folder, "--sweep", "steps=2,3")
    assert [_names(request) for request in requests] == [["ink.safetensors", "oil.safetensors"]] * 2


REFUSED: dict[str, tuple[list[str], int, str]] = {
    "a name without a file": (["embedding:inc"], 2, "embedding:inc: {folder} has no inc.safetensors; check the name"),
    "another model": (["embedding:sd2"], 2, "sd2.safetensors: is for another model: its vectors have width 1024, but"),
    "another width": (["embedding:wide"], 2, "wide.safetensors: is for another model: its vectors have width 8 for"),
    "beyond fp16": (["embedding:huge"], 2, "huge.safetensors: its vectors are beyond the range of the float16"),
    "a pickled file": (["embedding:old"], 2, "old.pt is pickled, which can run code when loaded"),
    "in the negative": (["a fox", "--negative", "embedding:inc"], 2, "embedding:inc: "),
    "for the refiner": (["embedding:inc", "--refine", "start.png", "--strength", "0.5"], 2, "embedding:inc: "),
    "two of a name": (["embedding:twice"], 2, "embedding:twice: is the name of "),
    "an older bundle": (["embedding:ink", "--engines", str(OLD)], 3, "of this bundle takes no embeddings, since an"),
    "no folder": (["a fox", "--embedding-dir", "nowhere"], 2, "--embedding-dir nowhere: no such folder; give the one"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_in_a_line(
    name: str, folder: Path, fails: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    save_file({"x": np.ones((1, 1024), np.float32)}, "sd2.safetensors")
    save_file(_tensors() | {"clip_l": np.ones((2, 8), np.float32)}, "wide.safetensors")
    save_file({key: values * 1e6 for key, values in _tensors().items()}, "huge.safetensors")
    for place in ("twice.safetensors", "styles/twice.safetensors"):
        save_file(_tensors(), place)
    Path("old.pt").write_bytes(b"\x80\x02")
    Image.new("RGB", (64, 64)).save("start.png")
    arguments, code, message = REFUSED[name]
    line = fails(trt_generate, ["--embedding-dir", str(folder), *arguments], code)
    assert message.format(folder=folder) in line
    if code == 3:
        assert "export it again: export-engines --base SRC --refiner SRC --out BUNDLE" in line


def test_in_comfyuis_way_a_word_without_a_file_is_left_out(asked: Any, folder: Path) -> None:
    (request,) = asked("a embedding:inc fox", "--compat", "comfyui", "--embedding-dir", folder)
    assert request.embeddings == ()


def test_an_older_bundle_draws_prompts_without_embeddings(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "fox.png"
    arguments = ["a fox", "--engines", str(OLD), "--embedding-dir", str(folder), "-o", str(out)]
    assert trt_generate([*arguments, "--steps", "1", "--width", "32", "--height", "32", "--json"]) == 0
    assert out.exists()
