"""A file matches the manifest's digest, or it is refused; a cached digest is not used after a change."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from sdxl_trt.engines.bundle import digests
from sdxl_trt.engines.bundle.digests import verify_file
from sdxl_trt.engines.bundle.records import FileRecord
from sdxl_trt.engines.errors import CorruptError, UsageError

CONTENT = b"weights" * 1000


def _record(content: bytes) -> FileRecord:
    return FileRecord(file="f.data", size=len(content), sha256=hashlib.sha256(content).hexdigest())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "f.data"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Cache digests of files of any size in the test's own folder; return the list of hashed files."""
    hashed: list[Path] = []
    real = digests.sha256_file
    monkeypatch.setattr(digests, "sha256_file", lambda path: (hashed.append(path), real(path))[1])
    monkeypatch.setattr(digests, "REMEMBER_FROM", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return hashed


def _cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "sdxl-trt" / "digests.json"


def _damage(path: Path) -> None:
    """Change one byte and keep size and mtime."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(bytes(content))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_the_recorded_file_passes(file: Path) -> None:
    verify_file(file, _record(CONTENT))


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT + b"x", b""])
def test_another_size_is_refused_with_both_sizes(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(CorruptError, match=rf"{len(content)} bytes.*{len(CONTENT)}.*export-engines again") as caught:
        verify_file(file, _record(CONTENT))
    assert caught.value.exit_code == 4


def test_another_byte_is_refused(file: Path) -> None:
    _damage(file)
    with pytest.raises(CorruptError, match=r"sha256.*export-engines again"):
        verify_file(file, _record(CONTENT))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.data"):
        verify_file(tmp_path / "none.data", _record(CONTENT))


def test_a_digest_is_cached_until_the_file_changes(file: Path, reads: list[Path]) -> None:
    verify_file(file, _record(CONTENT))
    verify_file(file, _record(CONTENT))
    assert reads == [file]


def test_a_changed_file_is_read_again(file: Path, reads: list[Path]) -> None:
    verify_file(file, _record(CONTENT))
    _damage(file)
    with pytest.raises(CorruptError):
        verify_file(file, _record(CONTENT))
    assert len(reads) == 2


def test_a_replaced_file_is_read_again(file: Path, reads: list[Path]) -> None:
    verify_file(file, _record(CONTENT))
    other = file.with_suffix(".new")
    other.write_bytes(CONTENT)
    _damage(other)
    other.replace(file)
    with pytest.raises(CorruptError):
        verify_file(file, _record(CONTENT))


def test_a_cached_digest_is_still_compared(file: Path, reads: list[Path]) -> None:
    verify_file(file, _record(CONTENT))
    with pytest.raises(CorruptError, match="sha256"):
        verify_file(file, FileRecord(file="f.data", size=len(CONTENT), sha256="0" * 64))


def _poison(tmp_path: Path) -> None:
    """Replace every digest in the cache by a wrong one."""
    memory = json.loads(_cache(tmp_path).read_text())
    _cache(tmp_path).write_text(json.dumps(dict.fromkeys(memory, "f" * 64)))


def test_a_digest_in_the_cache_is_used(file: Path, reads: list[Path], tmp_path: Path) -> None:
    verify_file(file, _record(CONTENT))
    _poison(tmp_path)
    with pytest.raises(CorruptError):
        verify_file(file, _record(CONTENT))


@pytest.mark.parametrize("mode", [0o660, 0o606, 0o666])
def test_a_cache_that_others_can_write_is_not_trusted(file: Path, reads: list[Path], tmp_path: Path, mode: int) -> None:
    verify_file(file, _record(CONTENT))
    _poison(tmp_path)
    _cache(tmp_path).chmod(mode)
    verify_file(file, _record(CONTENT))
    assert len(reads) == 2


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"a": {"b": 1}}'])
def test_a_broken_cache_costs_only_time(file: Path, reads: list[Path], tmp_path: Path, content: bytes) -> None:
    _cache(tmp_path).parent.mkdir(parents=True)
    _cache(tmp_path).write_bytes(content)
    verify_file(file, _record(CONTENT))
    verify_file(file, _record(CONTENT))
    assert reads == [file]


def test_a_cache_that_cannot_be_written_costs_only_time(file: Path, reads: list[Path], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    verify_file(file, _record(CONTENT))
    verify_file(file, _record(CONTENT))
    assert reads == [file, file]


def test_the_cache_drops_the_oldest_entries(
    file: Path, reads: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "MAX_ENTRIES", 2)
    for byte in range(4):
        content = bytes([byte]) * 10
        path = tmp_path / f"{byte}.data"
        path.write_bytes(content)
        verify_file(path, _record(content))
    kept = set(json.loads(_cache(tmp_path).read_text()).values())
    assert kept == {hashlib.sha256(bytes([byte]) * 10).hexdigest() for byte in (2, 3)}


def test_the_cache_is_private(file: Path, reads: list[Path], tmp_path: Path) -> None:
    verify_file(file, _record(CONTENT))
    assert _cache(tmp_path).parent.stat().st_mode & 0o077 == 0
