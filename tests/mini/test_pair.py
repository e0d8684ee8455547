"""The two diffusers folders: every tensor as it was trained, the published names, CLIP's vocabulary, atomic files."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from sdxl_trt.mini import architecture, pair
from sdxl_trt.mini import clip_vocabulary as vocabulary
from sdxl_trt.mini import materialize as exported

DIGESTS = Path(__file__).with_name("tensors.sha256")
"""SHA-256 of each tensor as it was trained: of "DTYPE [SHAPE] " and its bytes. `DIGEST  FOLDER NAME` a line."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return pair.materialize(tmp_path_factory.mktemp("pair"))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def names_of(path: Path) -> set[str]:
    with safe_open(path, framework="numpy") as file:
        return set(file.keys())


def test_the_package_exports_materialize() -> None:
    assert exported is pair.materialize


def test_indices_name_only_folders_that_exist(folders: tuple[Path, Path]) -> None:
    for folder in folders:
        index = read_json(folder / "model_index.json")
        named = {name for name, value in index.items() if isinstance(value, list) and value[0]}
        assert named == {entry.name for entry in folder.iterdir() if entry.is_dir()}


def test_base_and_refiner_differ_as_sdxl_does(folders: tuple[Path, Path]) -> None:
    base, refiner = (read_json(folder / "model_index.json") for folder in folders)
    assert base["_class_name"] == "StableDiffusionXLPipeline"
    assert base["force_zeros_for_empty_prompt"] is True
    assert refiner["_class_name"] == "StableDiffusionXLImg2ImgPipeline"
    assert refiner["force_zeros_for_empty_prompt"] is False
    assert refiner["requires_aesthetics_score"] is True
    first, second = (read_json(folder / "unet/config.json") for folder in folders)
    ids = architecture.ADDITION_TIME_DIM
    projection = architecture.text_encoder_2()["projection_dim"]
    assert first["projection_class_embeddings_input_dim"] == projection + 6 * ids
    assert second["projection_class_embeddings_input_dim"] == projection + 5 * ids
    widths = architecture.text_encoder()["hidden_size"], architecture.text_encoder_2()["hidden_size"]
    assert first["cross_attention_dim"] == sum(widths)
    assert second["cross_attention_dim"] == widths[1]


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_clip_keys_have_the_published_prefix(folders: tuple[Path, Path], part: str) -> None:
    names = names_of(folders[0] / part / "model.safetensors")
    assert {name for name in names if not name.startswith("text_model.")} == (
        {"text_projection.weight"} if part == "text_encoder_2" else set()
    )
    assert "text_model.embeddings.token_embedding.weight" in names
    assert "text_model.final_layer_norm.weight" in names


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    (path,) = folder.glob("*.safetensors")
    with safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_every_tensor_is_the_one_that_was_trained(folders: tuple[Path, Path]) -> None:
    wanted = dict(line.split("  ")[::-1] for line in DIGESTS.read_text(encoding="utf-8").splitlines())
    found = {
        f"{part} {name}": hashlib.sha256(f"{one.dtype} {list(one.shape)} ".encode() + one.tobytes()).hexdigest()
        for part in sorted({name.split(" ")[0] for name in wanted})
        for name, one in tensors_of(folders[0].parent / part).items()
    }
    assert len(wanted) == 1153
    assert found == wanted


def test_the_token_table_is_complete_and_its_rows_are_in_place(folders: tuple[Path, Path]) -> None:
    table = tensors_of(folders[0] / "text_encoder")[pair.TOKEN_TABLE]
    words = vocabulary.vocabulary()
    assert table.shape == (49408, architecture.text_encoder()["hidden_size"])
    assert table.dtype == np.float16
    assert (table[words["dog</w>"]] == table[words["parliament</w>"]]).all()
    assert (table[words["red</w>"]] != table[words["green</w>"]]).any()
    assert len(set(map(bytes, table))) > 30


def test_the_vocabulary_equals_clips() -> None:
    words = vocabulary.vocabulary()
    assert len(words) == 49408
    assert len(vocabulary.merges()) == 48894
    known = {
        "!": 0,
        "!</w>": 256,
        "a</w>": 320,
        "photo</w>": 1125,
        "cat</w>": 2368,
        "<|startoftext|>": 49406,
        "<|endoftext|>": 49407,
    }
    assert {word: words[word] for word in known} == known


def test_tokenizers_pad_as_sdxl(folders: tuple[Path, Path]) -> None:
    for part, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        config = read_json(folders[0] / part / "tokenizer_config.json")
        assert config["pad_token"] == pad
        assert config["model_max_length"] == 77
        assert read_json(folders[0] / part / "special_tokens_map.json")["pad_token"] == pad
        merges = (folders[0] / part / "merges.txt").read_text(encoding="utf-8").splitlines()
        assert merges[0] == "#version: 0.2"
        assert len(merges) == 48895


def test_shared_parts_are_the_same_in_both(folders: tuple[Path, Path]) -> None:
    for part in ("vae/diffusion_pytorch_model.safetensors", "text_encoder_2/model.safetensors"):
        assert (folders[0] / part).read_bytes() == (folders[1] / part).read_bytes()


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    pair.write_tensors(path, {"a": np.zeros(2, np.float16)})
    before = path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(pair.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        pair.write_tensors(path, {"a": np.ones(2, np.float16)})
    assert path.read_bytes() == before
