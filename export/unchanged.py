"""What the bundle at the target already has: found by key, checked by digest, taken over without a copy."""

__all__ = ["previous_bundle", "take_over", "unchanged_component"]

import contextlib
import errno
import os
import shutil
from pathlib import Path

from sdxl_trt.engines.bundle import Bundle, Component, read_bundle
from sdxl_trt.engines.digests import verify_file
from sdxl_trt.engines.errors import SdxlTrtError, explain_os_error

# What file systems without hard links answer.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK, errno.ENOSYS)


def previous_bundle(out: Path) -> Bundle | None:
    """Return the bundle at `out`, or None where there is none that can be opened."""
    with contextlib.suppress(SdxlTrtError):
        return read_bundle(out, partial=True)
    return None


def unchanged_component(bundle: Bundle | None, name: str, key: str) -> Component | None:
    """Return the component of `bundle` that has this name and key, if its files are what the manifest says."""
    component = bundle.manifest.components.get(name) if bundle else None
    if bundle is None or component is None or component.key != key:
        return None
    try:
        for record in (component.graph, component.weights):
            verify_file(bundle.path(record), record)
    except SdxlTrtError:
        return None
    return component


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
