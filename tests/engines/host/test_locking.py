"""One writer at a time, and the error on file systems without locks."""

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from sdxl_trt.engines.errors import UsageError
from sdxl_trt.engines.host.files import exclusive, sibling
from sdxl_trt.export.cli.export import main as export_engines

WITHOUT_LOCKS = [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS]


def _fail(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_second_writer_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with exclusive(out), pytest.raises(UsageError, match="another export is writing it"), exclusive(out):
        pass
    with exclusive(out):
        assert sibling(out, "lock").exists()
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("number", WITHOUT_LOCKS, ids=errno.errorcode.get)
def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    _fail(monkeypatch, number)
    said = pytest.raises(UsageError, match=r"has no locks .*; name a folder on a local disk, .* add --no-lock$")
    with said, exclusive(tmp_path / "out"):
        pytest.fail("written without a lock")
    assert list(tmp_path.iterdir()) == [], "not even a lock file"


def test_other_failures_of_a_lock_keep_their_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fail(monkeypatch, errno.ENOSPC)
    with pytest.raises(Exception, match="No space left on device; free some space"), exclusive(tmp_path / "out"):
        pass


def test_without_a_lock_there_is_only_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _fail(monkeypatch, errno.ENOLCK)
    with exclusive(tmp_path / "new" / "out", lock=False):
        assert list((tmp_path / "new").iterdir()) == []
    assert "is written without a lock" in caplog.text


def test_no_lock_lets_an_export_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def planned(*_: Any, **__: Any) -> None:
        raise UsageError("reached")

    _fail(monkeypatch, errno.EOPNOTSUPP)
    monkeypatch.setattr("sdxl_trt.export.exporter.planned", planned)
    for layout in ("bundle", "optimum"):
        arguments = ["--layout", layout, "--engine", "none", "--out", str(tmp_path / "out")]
        assert f"--out {tmp_path / 'out'}: its file system has no locks" in fails(export_engines, arguments, 2)
        assert fails(export_engines, [*arguments, "--no-lock"], 2) == "error: reached"
        export_engines([*arguments, "--no-lock"])
        assert "warning: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
