"""The cache folder of each system, and files that other users could have written."""

import os
import sys
from pathlib import Path

import pytest

from sdxl_trt.engines.host import cache_folder, owned_by_another, read_private, writable_by_others


def test_the_cache_is_where_the_system_keeps_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "sdxl-trt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "sdxl-trt"
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "Local"))
    assert cache_folder() == tmp_path / ".cache" / "sdxl-trt"
    monkeypatch.setattr(sys, "platform", "win32")
    assert cache_folder() == tmp_path / "Local" / "sdxl-trt"


@pytest.mark.parametrize(("mode", "shared"), [(0o600, False), (0o644, False), (0o664, True), (0o646, True)])
def test_a_file_that_others_can_write_is_not_read(tmp_path: Path, mode: int, *, shared: bool) -> None:
    file = tmp_path / "cached"
    file.write_bytes(b"content")
    file.chmod(mode)
    assert writable_by_others(file.stat()) is shared
    assert read_private(file, 7) == (b"" if shared else b"content")


def test_a_file_that_is_missing_or_too_large_is_empty(tmp_path: Path) -> None:
    (tmp_path / "cached").write_bytes(b"content")
    assert read_private(tmp_path / "cached", 6) == b""
    assert read_private(tmp_path / "missing", 6) == b""


def test_a_file_of_another_user_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cached"
    file.write_bytes(b"content")
    if file.stat().st_uid == 0:
        monkeypatch.setattr(os, "fstat", lambda _: os.stat_result((0o100600, 1, 1, 1, 4711, 0, 7, 0, 0, 0)))
        assert read_private(file, 7) == b""
    else:
        monkeypatch.setattr(os, "getuid", lambda: 4711)
        assert owned_by_another(file.stat())
        assert read_private(file, 7) == b""


def test_windows_has_neither_mode_bits_nor_owners(monkeypatch: pytest.MonkeyPatch) -> None:
    status = os.stat_result((0o100666, 1, 1, 1, 4711, 0, 7, 0, 0, 0))
    assert writable_by_others(status)
    assert owned_by_another(status)
    monkeypatch.setattr(sys, "platform", "win32")
    assert not writable_by_others(status)
    assert not owned_by_another(status)
