"""What the bundle at the target already has: found by key, checked by digest, taken over without a copy."""

__all__ = ["is_whole", "previous_bundle", "sound_component", "take_over"]

import contextlib
import errno
import os
import shutil
from pathlib import Path

from sdxl_trt.engines.bundle import Bundle, Component, read_bundle
from sdxl_trt.engines.digests import verify_file
from sdxl_trt.engines.errors import IncompatibleError, SdxlTrtError, explain_os_error

# What file systems without hard links answer.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK, errno.ENOSYS)


def previous_bundle(out: Path) -> Bundle | None:
    """Return the bundle at `out`, whatever state its files are in, or None where there is none.

    Raises IncompatibleError for a newer format, which is not ours to replace, and for nothing else: a manifest that
    is broken is replaced.
    """
    try:
        return read_bundle(out, partial=True, files=False)
    except IncompatibleError:
        raise
    except SdxlTrtError:
        return None


def is_whole(bundle: Bundle) -> bool:
    """Return whether a bundle can be opened."""
    with contextlib.suppress(SdxlTrtError):
        read_bundle(bundle.root)
        return True
    return False


def sound_component(bundle: Bundle, component: Component, *, required: bool = True) -> bool:
    """Return whether a component's files are what the manifest says; raise CorruptError where they are `required`."""
    try:
        for record in (component.graph, component.weights):
            verify_file(bundle.path(record), record)
    except SdxlTrtError:
        if required:
            raise
        return False
    return True


def take_over(bundle: Bundle, component: Component, folder: Path) -> None:
    """Give `folder` the files of a component that `bundle` has; the two share them until one is removed."""
    for record in (component.graph, component.weights):
        source, target = bundle.path(record), folder / record.file
        try:
            target.parent.mkdir(exist_ok=True)
            target.unlink(missing_ok=True)
            _link(source, target)
        except OSError as exc:
            raise explain_os_error(exc, f"writing {target}") from exc


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as exc:
        if exc.errno not in _NO_LINKS:
            raise
        shutil.copyfile(source, target)
