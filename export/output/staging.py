"""An output folder that is created or replaced only as a whole."""

__all__ = ["OPTIMUM_FORMAT", "check_target", "exclusive", "partial_folder", "publish", "resumable", "staged_folder"]

import contextlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sdxl_trt.engines import SdxlTrtError, UsageError, explain_os_error
from sdxl_trt.engines.bundle import FORMAT_NAME, MANIFEST
from sdxl_trt.engines.host import exclusive as locked
from sdxl_trt.engines.host import sibling

log = logging.getLogger("sdxl_trt.export")
OPTIMUM_FORMAT = "sdxl-trt-optimum"
_OURS = (FORMAT_NAME, OPTIMUM_FORMAT)


def check_target(out: Path) -> None:
    """Raise UsageError unless `out` is new, empty, or an earlier export, which may be replaced as a whole."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UsageError(f"--out {out}: is not a folder; name a new folder, or a bundle to replace")
    if out.resolve() == Path.cwd() or os.path.ismount(out):
        raise UsageError(f"--out {out}: cannot be replaced as a whole; name a folder inside it")
    if out.is_dir() and any(out.iterdir()) and not _is_ours(out):
        raise UsageError(f"--out {out}: holds other files and is not a bundle; name an empty or new folder")


def _is_ours(folder: Path) -> bool:
    """Return whether `folder` is an export; manifest.json must name our format, since other programs write one too."""
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("format") in _OURS


@contextlib.contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """Yield a hidden sibling of `out`, removed at the end unless it was published as `out`."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as exc:
        raise explain_os_error(exc, f"writing to {out.parent}") from exc
    try:
        folder.chmod(0o755)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def exclusive(out: Path, *, lock: bool = True) -> Iterator[None]:
    """Hold the lock file beside `out` (none without `lock`), after cleaning up what a killed export left.

    Raises UsageError if another process holds the lock, or the file system does not support locks.
    """
    with locked(out, lock=lock):
        try:
            _recover(out)
        except OSError as exc:
            raise explain_os_error(exc, f"writing to {out.parent}") from exc
        yield


def _recover(out: Path) -> None:
    """Restore the folder that a killed export moved aside, and remove temporary folders that nobody resumes."""
    retired = sibling(out, "old")
    if retired.exists() and not out.exists():
        retired.rename(out)
    shutil.rmtree(retired, ignore_errors=True)
    for stale in out.parent.iterdir():
        if stale.name.startswith(f".{out.name}.") and stale.name.endswith(".partial") and stale != partial_folder(out):
            shutil.rmtree(stale, ignore_errors=True)


def partial_folder(out: Path) -> Path:
    """Return the folder where an export of `out` keeps its finished components."""
    return sibling(out, "partial")


@contextlib.contextmanager
def resumable(out: Path, record: str) -> Iterator[Path]:
    """Yield the hidden sibling of `out` that will become `out`; its subfolders with a file `record` are finished.

    After an interruption the finished ones stay for the next export. After an SdxlTrtError, and if none is finished,
    the folder is removed.
    """
    folder = partial_folder(out)
    try:
        if folder.is_symlink() or folder.is_file():
            folder.unlink()
        folder.mkdir(exist_ok=True)
        folder.chmod(0o755)
        _drop_unfinished(folder, record)
    except OSError as exc:
        raise explain_os_error(exc, f"writing to {out.parent}") from exc
    try:
        yield folder
    except SdxlTrtError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    except BaseException:
        kept = _drop_unfinished(folder, record) if folder.exists() else 0
        if kept:
            log.warning("kept %d finished components in %s; run the same command to resume", kept, folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _drop_unfinished(folder: Path, record: str) -> int:
    """Remove unfinished subfolders and files; return the number of finished ones."""
    kept = 0
    for part in list(folder.iterdir()):
        if not part.is_symlink() and (part / record).is_file():
            kept += 1
        elif part.is_dir() and not part.is_symlink():
            shutil.rmtree(part)
        else:
            part.unlink()
    return kept


def publish(folder: Path, out: Path) -> None:
    """Rename `folder` to `out`; a folder that was at `out` is removed only after that."""
    retired = sibling(out, "old")
    try:
        if out.exists():
            out.rename(retired)
        try:
            folder.rename(out)
        except BaseException:  # interrupts too: the old folder must not stay aside
            if retired.exists() and not out.exists():
                retired.rename(out)
            raise
    except OSError as exc:
        raise explain_os_error(exc, f"writing {out}") from exc
    shutil.rmtree(retired, ignore_errors=True)
