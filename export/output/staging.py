"""An output folder that appears, or is replaced, only as a whole."""

__all__ = ["OPTIMUM_FORMAT", "check_target", "exclusive", "partial_folder", "publish", "resumable", "staged_folder"]

import contextlib
import json
import logging
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
    """Raise UsageError unless `out` is new, empty, or an export of ours that may be replaced as a whole."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UsageError(f"--out {out}: is not a folder; name a folder that does not exist yet, or a bundle to replace")
    if out.resolve() == Path.cwd() or out.is_mount():
        raise UsageError(f"--out {out}: cannot be replaced as a whole; name a folder inside it")
    if out.is_dir() and any(out.iterdir()) and not _is_ours(out):
        raise UsageError(f"--out {out}: holds other files and is no bundle; name an empty or new folder")


def _is_ours(folder: Path) -> bool:
    """Return whether `folder` is ours to replace: a manifest.json alone proves nothing, other programs write them."""
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("format") in _OURS


@contextlib.contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """Yield a hidden sibling of `out` that is gone at the end, unless it has become `out`."""
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
    """Hold the lock of `out` beside it, or none without `lock`, with what a killed export left there cleared away.

    Raises UsageError where another process has it, and where the file system takes no locks.
    """
    with locked(out, lock=lock):
        try:
            _recover(out)
        except OSError as exc:
            raise explain_os_error(exc, f"writing to {out.parent}") from exc
        yield


def _recover(out: Path) -> None:
    """Bring back the folder that a killed export had moved aside, and remove what nobody will go on with."""
    retired = sibling(out, "old")
    if retired.exists() and not out.exists():
        retired.rename(out)
    shutil.rmtree(retired, ignore_errors=True)
    for stale in out.parent.iterdir():
        if stale.name.startswith(f".{out.name}.") and stale.name.endswith(".partial") and stale != partial_folder(out):
            shutil.rmtree(stale, ignore_errors=True)


def partial_folder(out: Path) -> Path:
    """Return where an export of `out` keeps what it has finished."""
    return sibling(out, "partial")


@contextlib.contextmanager
def resumable(out: Path, record: str) -> Iterator[Path]:
    """Yield the hidden sibling of `out` that is to become it; parts in it that hold the file `record` are finished.

    An interruption leaves the finished parts there for the next export. After an error that we can explain, and
    where there are none, nothing is left.
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
            log.warning("%d finished components are kept in %s; the same command goes on from there", kept, folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _drop_unfinished(folder: Path, record: str) -> int:
    """Remove what was being written; return how many finished parts are left."""
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
    """Put `folder` in the place of `out`; what stood there is removed only once the new one stands."""
    retired = sibling(out, "old")
    try:
        if out.exists():
            out.rename(retired)
        try:
            folder.rename(out)
        except BaseException:  # an interrupt as well: the older one must not stay aside
            if retired.exists() and not out.exists():
                retired.rename(out)
            raise
    except OSError as exc:
        raise explain_os_error(exc, f"writing {out}") from exc
    shutil.rmtree(retired, ignore_errors=True)
