"""Which folders may be replaced, and that they are replaced as a whole or not at all."""

import json
from pathlib import Path

import pytest

from sdxl_trt.engines.errors import SdxlTrtError, UsageError
from sdxl_trt.export.output.staging import OPTIMUM_FORMAT, check_target, publish, staged_folder


def _ours(out: Path, content: object) -> Path:
    out.mkdir()
    (out / "manifest.json").write_text(json.dumps(content))
    return out


@pytest.mark.parametrize("content", [{"format": OPTIMUM_FORMAT}, {"format": "sdxl-trt-bundle"}])
def test_earlier_exports_may_be_replaced(tmp_path: Path, content: object) -> None:
    check_target(_ours(tmp_path / "out", content))


@pytest.mark.parametrize("content", [{"format": "webextension"}, {"format": ["sdxl-trt-bundle"]}, {}, [], "x", 1])
def test_a_folder_with_another_programs_manifest_is_not_replaced(tmp_path: Path, content: object) -> None:
    with pytest.raises(UsageError, match="holds other files"):
        check_target(_ours(tmp_path / "out", content))


def test_new_and_empty_folders_are_accepted(tmp_path: Path) -> None:
    check_target(tmp_path / "new" / "deep")
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty")


def test_links_files_and_the_working_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    for name in ("link", "file"):
        with pytest.raises(UsageError, match="is not a folder"):
            check_target(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="cannot be replaced as a whole"):
        check_target(Path())


def test_the_new_folder_replaces_the_old(tmp_path: Path) -> None:
    out = _ours(tmp_path / "out", {})
    with staged_folder(out) as folder:
        (folder / "new").write_text("new")
        publish(folder, out)
    assert [path.name for path in out.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [out]


def test_a_failure_leaves_the_old_folder(tmp_path: Path) -> None:
    out = _ours(tmp_path / "out", {})

    def fail() -> None:
        with staged_folder(out) as folder:
            (folder / "new").write_text("new")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [path.name for path in out.iterdir()] == ["manifest.json"]
    assert list(tmp_path.iterdir()) == [out]


def test_a_failed_rename_restores_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = _ours(tmp_path / "out", {})
    rename = Path.rename

    def fail(source: Path, target: Path) -> Path:
        if source.suffix == ".partial":
            raise OSError(13, "Permission denied")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(SdxlTrtError, match="Permission denied"), staged_folder(out) as folder:
        publish(folder, out)
    assert [path.name for path in out.iterdir()] == ["manifest.json"]
    assert list(tmp_path.iterdir()) == [out]
