"""Atomic writes, and paths that stay inside a bundle."""

import errno
import hashlib
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_trt.engines.errors import CorruptError, ResourceError, SdxlTrtError, UsageError
from sdxl_trt.engines.host.files import atomic_write, contained, sha256_file


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Return a file that holds `old`, alone in its folder."""
    path = tmp_path / "out.bin"
    path.write_bytes(b"old")
    return path


def _untouched(target: Path) -> bool:
    return target.read_bytes() == b"old" and list(target.parent.iterdir()) == [target]


def test_a_write_replaces_the_file_and_leaves_nothing_else(target: Path) -> None:
    with atomic_write(target) as file:
        file.write(b"new")
        assert target.read_bytes() == b"old", "the old file must stay until the new one is complete"
    assert target.read_bytes() == b"new"
    assert list(target.parent.iterdir()) == [target]


def test_a_written_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "out") as file:
            file.write(b"x")
        assert os.umask(0o027) == 0o027, "the umask must not change"
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt(), GeneratorExit()])
def test_a_failure_in_the_middle_leaves_the_old_file(target: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), atomic_write(target) as file:  # noqa: PT012
        file.write(b"half")
        raise error
    assert _untouched(target)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(target: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), full)
    with pytest.raises(ResourceError, match="free some space") as caught, atomic_write(target) as file:
        file.write(b"new")
    monkeypatch.undo()
    assert isinstance(caught.value.__cause__, OSError)
    assert _untouched(target)


def test_the_bytes_are_synced_before_the_rename(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(Path, "replace", lambda *args: (order.append("replace"), replace(*args))[1])
    with atomic_write(target) as file:
        file.write(b"new")
    assert order == ["fsync", "replace"]


@pytest.mark.parametrize("name", ["no/such/out.png", "out.bin/inside", "folder", "n" * 300])
def test_a_place_that_cannot_be_written_is_a_usage_error(target: Path, name: str) -> None:
    (target.parent / "folder").mkdir()
    with pytest.raises(UsageError), atomic_write(target.parent / name) as file:
        file.write(b"x")
    assert sorted(path.name for path in target.parent.iterdir()) == ["folder", "out.bin"]


@pytest.mark.parametrize("name", ["model.onnx", "unet/model.onnx", "a/b/c.data", "..data", "a..b"])
def test_a_plain_path_is_inside(tmp_path: Path, name: str) -> None:
    assert contained(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "..", "../x", "a/../../x", "a/..", "a\\b", "..\\x", "a\0b", "//host/x", "./../x"]
)
def test_a_path_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CorruptError):
        contained(tmp_path, name)


@pytest.mark.parametrize("name", ["C:model.onnx", "unet/C:x", "NUL", "unet/con.data", "model.onnx.", "a "])
def test_a_name_that_means_another_place_on_windows_is_refused_there(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert contained(tmp_path, name) == tmp_path / name
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(CorruptError, match="is not a plain path inside the folder"):
        contained(tmp_path, name)


def test_the_temporary_file_can_be_opened_under_its_name(target: Path) -> None:
    with atomic_write(target) as file:
        with Path(file.name).open("r+b") as another:
            another.write(b"of another process")
        assert Path(file.name).is_absolute()
        assert Path(file.name).parent == target.parent
    assert target.read_bytes() == b"of another process"


@pytest.mark.parametrize("place", ["file", "folder/file"])
def test_a_link_is_refused_wherever_it_points(tmp_path: Path, place: str) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_bytes(b"x")
    first = place.split("/", maxsplit=1)[0]
    (tmp_path / first).symlink_to(tmp_path / "real" if "/" in place else tmp_path / "real" / "file")
    with pytest.raises(CorruptError, match="symbolic link"):
        contained(tmp_path, place)


@settings(deadline=None)
@given(st.text(st.characters(codec=None), max_size=60))
def test_any_name_stays_inside_or_is_refused(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    root = tmp_path_factory.getbasetemp()
    try:
        path = contained(root, name)
    except SdxlTrtError:
        return
    assert path.is_relative_to(root)
    assert ".." not in path.relative_to(root).parts


def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptError):
        contained(tmp_path, "n" * 300)


@pytest.mark.parametrize("size", [0, 1, 1 << 20])
def test_a_digest_is_sha256(tmp_path: Path, size: int) -> None:
    content = bytes(size)
    (tmp_path / "f").write_bytes(content)
    assert sha256_file(tmp_path / "f") == hashlib.sha256(content).hexdigest()
