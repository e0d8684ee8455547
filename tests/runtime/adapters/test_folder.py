"""Names in a folder of LoRAs: found in sub-folders, never outside, and never behind a link."""

from pathlib import Path

import pytest

from sdxl_trt.engines.errors import UsageError
from sdxl_trt.runtime.adapters import folder as folders
from sdxl_trt.runtime.adapters.folder import find_named


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "loras"
    (root / "style" / "old").mkdir(parents=True)
    for name in ("ink", "style/ink", "style/pen", "style/old/pen", "odd name.v2"):
        (root / f"{name}.safetensors").write_bytes(b"")
    (root / "notes.txt").write_bytes(b"")
    (tmp_path / "outside.safetensors").write_bytes(b"")
    return root


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("style/ink", ["style/ink"]),
        ("style\\ink.safetensors", ["style/ink"]),
        ("ink", ["ink", "style/ink"]),
        ("pen", ["style/old/pen", "style/pen"]),
        ("old/pen", ["style/old/pen"]),
        ("odd name.v2", ["odd name.v2"]),
        ("in", []),
        ("notes.txt", []),
        ("outside", []),
    ],
)
def test_a_name_is_found_with_and_without_its_ending_and_folders(folder: Path, name: str, found: list[str]) -> None:
    assert find_named(folder, name, "--lora x") == [folder / f"{one}.safetensors" for one in found]


def test_an_exact_name_is_a_path_from_the_folder(folder: Path) -> None:
    assert find_named(folder, "ink.safetensors", "node 2", exact=True) == [folder / "ink.safetensors"]
    assert find_named(folder, "pen.safetensors", "node 2", exact=True) == []


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "..\\outside", "a/../../outside", "C:x", "", "a\0b"])
def test_a_name_that_leads_outside_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"^--lora x: .* is not the name of a file in a folder"):
        find_named(folder, name, "--lora x")


def test_links_are_not_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "far.safetensors").write_bytes(b"")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "near.safetensors").symlink_to(tmp_path / "outside.safetensors")
    assert find_named(folder, "far", "--lora far") == []
    with pytest.raises(UsageError, match="is a symbolic link, which is not followed; copy the file itself there"):
        find_named(folder, "near", "--lora near")


def test_a_file_that_is_added_or_removed_is_noticed(folder: Path) -> None:
    for _ in range(3):
        assert find_named(folder, "new", "--lora new") == []
        (folder / "style" / "new.safetensors").write_bytes(b"")
        assert find_named(folder, "new", "--lora new") == [folder / "style" / "new.safetensors"]
        (folder / "style" / "new.safetensors").unlink()


def test_a_folder_that_has_not_changed_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "time_ns", lambda: 2**63)  # long after the folder's last change
    folders._listing.cache_clear()
    for _ in range(3):
        find_named(folder, "pen", "--lora pen")
    assert folders._listing.cache_info().misses == 1
    (folder / "style" / "new.safetensors").write_bytes(b"")
    assert find_named(folder, "new", "--lora new")


def test_a_missing_or_endless_folder_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"reading .*nowhere: No such file or directory"):
        find_named(folder / "nowhere", "ink", "--lora ink")
    monkeypatch.setattr(folders, "MOST_FILES", 3)
    folders._listing.cache_clear()
    with pytest.raises(UsageError, match="holds more than 3 files; give the folder of the LoRAs"):
        find_named(folder, "ink", "--lora ink")
