"""Reuse of the bundle at the target: parts are found by key, checked by digest, and hard-linked."""

__all__ = ["is_whole", "previous_bundle", "sound_component", "take_over", "take_over_plans"]

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from sdxl_trt.engines import IncompatibleError, SdxlTrtError, explain_os_error
from sdxl_trt.engines.bundle import Bundle, Component, FileRecord, PlanRecord, read_bundle, verify_file
from sdxl_trt.engines.host import contained
from sdxl_trt.engines.plans import PLANS, remove_write_permission

# Errors of file systems without hard links, or without more of them; Windows reports both as invalid arguments.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK, errno.ENOSYS, errno.EINVAL)


def previous_bundle(out: Path) -> Bundle | None:
    """Return the bundle at `out`, without checking its files, or None if there is none or its manifest is broken.

    Raises IncompatibleError for a newer format, which this version must not replace.
    """
    try:
        return read_bundle(out, partial=True, files=False)
    except IncompatibleError:
        raise
    except SdxlTrtError:
        return None


def is_whole(bundle: Bundle) -> bool:
    """Return whether a bundle can be opened as a complete one."""
    with contextlib.suppress(SdxlTrtError):
        read_bundle(bundle.root)
        return True
    return False


def sound_component(bundle: Bundle, component: Component, *, required: bool = True) -> bool:
    """Return whether a component's files match the manifest; if `required`, raise CorruptError instead of False."""
    try:
        for record in component.files:
            verify_file(bundle.path(record), record)
    except SdxlTrtError:
        if required:
            raise
        return False
    return True


def take_over(bundle: Bundle, files: Iterable[FileRecord], folder: Path) -> None:
    """Hard-link these files of `bundle` into `folder`; copy them if the file system has no hard links."""
    for record in files:
        source, target = bundle.path(record), folder / record.file
        try:
            target.parent.mkdir(exist_ok=True)
            target.unlink(missing_ok=True)
            _link(source, target)
        except OSError as exc:
            raise explain_os_error(exc, f"writing {target}") from exc


def take_over_plans(bundle: Bundle, components: Mapping[str, Component], folder: Path) -> tuple[PlanRecord, ...]:
    """Link the plans of `bundle` that were built from `components` into `folder`; return their records."""
    kept = tuple(record for record in bundle.manifest.plans if _still_fits(bundle, record, components))
    take_over(bundle, (record.file for record in kept), folder)
    if kept:
        remove_write_permission(folder / PLANS)
    for record in kept:
        with contextlib.suppress(OSError, SdxlTrtError):  # logs are for people only: a missing one is no error
            _link(contained(bundle.root, record.log), folder / record.log)
    return kept


def _still_fits(bundle: Bundle, record: PlanRecord, components: Mapping[str, Component]) -> bool:
    component = components.get(record.key.component)
    if component is None or not bundle.path(record.file).is_file():
        return False
    graph = component.planned_graph(record.key.lora_rank)
    return graph is not None and (record.key.graph, record.key.weights) == (graph.sha256, component.weights.sha256)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as exc:
        if exc.errno not in _NO_LINKS:
            raise
        shutil.copyfile(source, target)
