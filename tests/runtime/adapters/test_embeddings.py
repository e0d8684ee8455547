"""Embeddings are found by name in one folder and below it, and nowhere else."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sdxl_trt.engines.errors import SourceError, UsageError
from sdxl_trt.runtime.adapters.embeddings import NO_EMBEDDINGS, Embeddings

VECTORS = np.ones((2, 8), np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "embeddings"
    for name in ("ink", "styles/oil", "styles/old/ink2", "v1.2"):
        path = root / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"clip_g": VECTORS, "clip_l": VECTORS * len(name)}, path)
    save_file({"clip_g": VECTORS}, tmp_path / "outside.safetensors")
    return root


@pytest.mark.parametrize("name", ["ink", "ink.safetensors", "oil", "styles/oil", "styles\\oil", "old/ink2", "v1.2"])
def test_a_name_may_have_an_ending_and_folders(name: str, folder: Path) -> None:
    found = Embeddings(folder).find(name)
    assert found is not None
    stem = name.replace("\\", "/").split("/")[-1].removesuffix(".safetensors")
    assert found.name == f"{stem}.safetensors"


@pytest.mark.parametrize(
    "name",
    ["outside", "../outside", "styles/../../outside", "nothing", "", ".", "a:b", "x" * 300, "in", "ink.pt", "\0"],
)
def test_what_is_not_in_the_folder_is_not_found(name: str, folder: Path) -> None:
    assert Embeddings(folder).find(name) is None
    assert Embeddings(folder).find(str(folder.parent / "outside")) is None


def test_two_files_of_one_name_are_refused_naming_both(folder: Path) -> None:
    save_file({"clip_g": VECTORS}, folder / "oil.safetensors")
    with pytest.raises(UsageError, match=r"embedding:oil: is the name of .*oil\.safetensors and of .*oil\.safetensors"):
        Embeddings(folder).find("oil")
    assert Embeddings(folder).find("styles/oil") is not None


def test_a_link_is_not_followed(folder: Path) -> None:
    (folder / "linked.safetensors").symlink_to(folder.parent / "outside.safetensors")
    with pytest.raises(UsageError, match="is a symbolic link"):
        Embeddings(folder).find("linked")


@pytest.mark.parametrize("name", ["old", "old.pt", "sub/old"])
def test_a_pickled_file_is_refused_by_name(name: str, folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "old.pt").write_bytes(b"\x80\x02string_to_param")
    embeddings = Embeddings(folder)
    assert embeddings.find(name) is None
    with pytest.raises(SourceError, match=r"old\.pt is pickled, which can run code when loaded; get the embedding as"):
        embeddings.refuse_pickled(name)
    embeddings.refuse_pickled("ink3")


def test_a_request_keeps_what_it_has_checked(folder: Path) -> None:
    embeddings = Embeddings(folder)
    before = embeddings.find("ink")
    save_file({"clip_g": VECTORS * 5}, folder / "ink.safetensors")
    assert embeddings.find("ink") is before
    assert Embeddings(folder).find("ink") != before
    embeddings.find("nothing")
    assert embeddings.used == (before,)


def test_without_a_folder_there_are_none() -> None:
    assert NO_EMBEDDINGS.find("ink") is None
    NO_EMBEDDINGS.refuse_pickled("ink")
    assert NO_EMBEDDINGS.used == ()
