"""Everything that a manifest refers to exists, has the right kind, and is inside the bundle."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdxl_trt.engines.bundle.bundle import Bundle
from sdxl_trt.engines.errors import CorruptError

Json = Any


def test_a_valid_bundle_returns_its_paths(valid: Json, read: Callable[[Json], Bundle], tmp_path: Path) -> None:
    bundle = read(valid)
    assert bundle.path(bundle.manifest.components["unet"].weights) == tmp_path / "unet" / "weights.data"


FILES = [
    ("components", "unet", "graph"),
    ("components", "vae_encoder", "weights"),
    ("tokenizers", "tokenizer_2", "file"),
]


def _record(manifest: Json, place: tuple[str, ...]) -> Json:
    for key in place:
        manifest = manifest[key]
    return manifest


@pytest.mark.parametrize("place", FILES)
@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_size_is_corrupt(
    valid: Json, read: Callable[[Json], Bundle], tmp_path: Path, place: tuple[str, ...], change: int
) -> None:
    path = tmp_path / _record(valid, place)["file"]
    path.write_bytes((path.read_bytes() + b"x")[: path.stat().st_size + change])
    with pytest.raises(CorruptError, match=f"{path.name}.*bytes.*export-engines again") as caught:
        read(valid)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("place", FILES)
def test_a_missing_file_is_corrupt(
    valid: Json, read: Callable[[Json], Bundle], tmp_path: Path, place: tuple[str, ...]
) -> None:
    (tmp_path / _record(valid, place)["file"]).unlink()
    with pytest.raises(CorruptError, match="not readable"):
        read(valid)


@pytest.mark.parametrize("place", FILES)
@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "unet/../../secret", "unet\\..\\secret", "", "a\0b"])
def test_a_path_that_leaves_the_bundle_is_corrupt(
    valid: Json, read: Callable[[Json], Bundle], tmp_path: Path, place: tuple[str, ...], name: str
) -> None:
    (tmp_path.parent / "secret").write_bytes(b"secret")
    _record(valid, place).update(file=name, size=6)
    with pytest.raises(CorruptError):
        read(valid)


@pytest.mark.parametrize("name", [".", "unet", "unet/."])
def test_a_folder_as_a_file_is_corrupt(valid: Json, read: Callable[[Json], Bundle], tmp_path: Path, name: str) -> None:
    valid["components"]["unet"]["graph"].update(file=name, size=(tmp_path / name).stat().st_size)
    with pytest.raises(CorruptError):
        read(valid)


def test_a_pipe_as_a_file_is_corrupt(valid: Json, read: Callable[[Json], Bundle], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # its size is 0, and reading it would wait for ever
    valid["components"]["unet"]["graph"].update(file="pipe", size=0)
    with pytest.raises(CorruptError):
        read(valid)


@pytest.mark.parametrize("name", ["n" * 300, "d/" * 3000 + "f", "\udc80", "unet/model.onnx/inside"])
def test_a_name_that_no_file_can_have_is_corrupt(valid: Json, read: Callable[[Json], Bundle], name: str) -> None:
    valid["components"]["unet"]["graph"]["file"] = name
    with pytest.raises(CorruptError):
        read(valid)


@pytest.mark.parametrize("linked", ["unet/weights.data", "unet"])
def test_a_link_is_corrupt(valid: Json, read: Callable[[Json], Bundle], tmp_path: Path, linked: str) -> None:
    path, moved = tmp_path / linked, tmp_path / "moved"
    path.rename(moved)
    path.symlink_to(moved)
    with pytest.raises(CorruptError, match="symbolic link"):
        read(valid)


def test_a_file_that_became_a_link_after_reading_is_corrupt(
    valid: Json, read: Callable[[Json], Bundle], tmp_path: Path
) -> None:
    bundle = read(valid)
    path = tmp_path / "unet" / "weights.data"
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    with pytest.raises(CorruptError, match="symbolic link"):
        bundle.path(bundle.manifest.components["unet"].weights)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (("unet",), "gone"),
        (("unet",), "text_encoder_2"),
        (("unet",), "vae_decoder"),  # the decoder's own name: one component cannot be both
        (("vae", "decoder"), "vae_encoder"),
        (("vae", "encoder"), "vae_decoder"),
        (("vae", "encoder"), "unet"),
        (("text_encoders", 0, "component"), "unet"),
        (("text_encoders", 0, "tokenizer"), "gone"),
        (("text_encoders", 0, "pooled"), False),
        (("text_encoders",), []),
        (("text_encoders", 0, "component"), "vae_encoder"),
    ],
)
def test_a_role_without_its_component_is_corrupt(
    valid: Json, read: Callable[[Json], Bundle], place: tuple[Any, ...], name: Any
) -> None:
    _record(valid["base"], place[:-1])[place[-1]] = name
    with pytest.raises(CorruptError, match=r"base (needs|has|pairs)"):
        read(valid)


def test_two_pooled_encoders_are_corrupt(valid: Json, read: Callable[[Json], Bundle]) -> None:
    valid["base"]["text_encoders"] *= 2
    with pytest.raises(CorruptError, match="2 pooled"):
        read(valid)


@pytest.mark.parametrize("digest", ["0" * 63, "0" * 65, "G" * 64, "A" * 64, ""])
def test_an_invalid_digest_is_corrupt(valid: Json, read: Callable[[Json], Bundle], digest: str) -> None:
    valid["components"]["unet"]["graph"]["sha256"] = digest
    with pytest.raises(CorruptError):
        read(valid)


def test_a_component_without_a_required_input_is_corrupt(valid: Json, read: Callable[[Json], Bundle]) -> None:
    component = read(valid).manifest.components["unet"]
    with pytest.raises(CorruptError, match="absent"):
        component.input("absent")


def test_an_encoder_and_a_tokenizer_of_other_lengths_are_corrupt(valid: Json, read: Callable[[Json], Bundle]) -> None:
    valid["tokenizers"]["tokenizer_2"]["max_length"] = 76
    with pytest.raises(CorruptError, match="do not fit"):
        read(valid)


def test_a_pooled_encoder_must_return_text_embeds(valid: Json, read: Callable[[Json], Bundle]) -> None:
    valid["components"]["text_encoder_2"]["outputs"].pop()
    with pytest.raises(CorruptError, match="no text_embeds"):
        read(valid)


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_a_graph_of_another_kind_is_corrupt(side: str, valid: Json, read: Callable[[Json], Bundle]) -> None:
    valid["components"]["unet"][side].pop()
    with pytest.raises(CorruptError, match="unet is not a unet"):
        read(valid)
