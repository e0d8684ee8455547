"""The files of trt-generate: their names, whether they can be written, noise in and latents out."""

__all__ = ["Pictures", "check_outputs", "load_latents", "picture_files", "save_latents"]

import argparse
import contextlib
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_trt.engines import UsageError, explain_os_error
from sdxl_trt.engines.host import refused_by_windows
from sdxl_trt.runtime.cli.file_names import file_stem
from sdxl_trt.runtime.images import FORMATS, save_image

if TYPE_CHECKING:
    from PIL.Image import Image

    from sdxl_trt.runtime.images import Picture
    from sdxl_trt.runtime.pipeline import Run


def check_outputs(arguments: argparse.Namespace) -> None:
    """Raise UsageError before the work if its results could not be written."""
    endings = {"-o": (arguments.out, _endings(arguments.format)), "--save-latents": (arguments.save_latents, (".npz",))}
    for option, (path, allowed) in endings.items():
        if path is None:
            continue
        if path.suffix.lower() not in allowed:
            raise UsageError(f"{option} {path}: give a name that ends in {' or '.join(allowed)}")
        if sys.platform == "win32" and refused_by_windows(path.name):
            raise UsageError(f"{option} {path}: Windows does not allow this name; give one without < > : \" | ? *,"
                             " and not that of a device such as NUL or COM1")  # fmt: skip
        if path.is_dir() or not path.parent.is_dir():
            raise UsageError(f"{option} {path}: is not a file in an existing folder; make the folder first")
    if arguments.save_latents and (arguments.sweep or arguments.prompts):
        raise UsageError("--save-latents keeps those of one request; leave --sweep and --prompts out")


def _endings(kind: str | None) -> tuple[str, ...]:
    """Return the allowed endings of picture names: all of them if no format was requested."""
    return tuple(ending for ending, name in FORMATS.items() if kind in (None, name.lower()))


_ZIP = b"PK\x03\x04"


class Pictures:
    """The files of a batch's pictures: `out` itself for a single one, else numbered beside it.

    With a `sheet`, `out` is the sheet's, and all pictures are numbered. A file that `out` names is replaced.
    Without `out`, the name is `prefix` (a workflow's SaveImage prefix, read by `file_stem`) or ``sdxl-<seed>``, in the
    current folder: then nothing is replaced, and the first free one of NAME, NAME-1, NAME-2 … is used.
    """

    def __init__(
        self,
        out: Path | None,
        kind: str | None,
        runs: "Sequence[Run]",
        *,
        sheet: bool = False,
        prefix: str | None = None,
    ) -> None:
        counts = [len(run.request.seeds) for run in runs]
        self._firsts = [sum(counts[:number]) for number in range(len(counts))]
        self._count = sum(counts)
        self._alone, self._sheet = self._count == 1 and not sheet, sheet
        self._replace = out is not None
        if out is None:
            request = runs[0].request
            stem = None if prefix is None else file_stem(prefix, request.width, request.height)
            name = Path(f"{stem or f'sdxl-{request.seeds[0]}'}{_endings(kind or 'png')[0]}")
            out = next(path for path in _numbered(name) if not any(map(os.path.lexists, self._names(path))))
        self.out = out

    @property
    def preview(self) -> Path:
        """Return the file that shows the running step."""
        return _preview(self.out)

    def path(self, number: int, picture: int) -> Path:
        """Return the file of picture `picture` of request `number`."""
        return self.out if self._alone else _beside(self.out, self._firsts[number] + picture)

    def save(self, picture: "Picture", number: int, index: int, *, metadata: bool = True) -> Path:
        """Write `picture`, the one of this `index` of request `number`, and return its file."""
        return self._put(
            self.path(number, index),
            lambda path: picture.save(path, metadata=metadata, replace=self._replace),
        )

    def save_sheet(self, sheet: "Image", texts: Mapping[str, str]) -> Path:
        """Write the sheet with its texts and return its file."""
        return self._put(self.out, lambda path: save_image(sheet, path, texts, replace=self._replace))

    def _names(self, out: Path) -> Iterator[Path]:
        """Yield all files that a run with this `out` writes."""
        if self._alone or self._sheet:
            yield out
        yield _preview(out)
        yield from (_beside(out, number) for number in range(0 if self._alone else self._count))

    def _put(self, path: Path, write: Callable[[Path], None]) -> Path:
        """Write to `path`, or to the next free name if another run has taken it."""
        for free in _numbered(path):
            with contextlib.suppress(FileExistsError):
                write(free)
                return free
        raise AssertionError


def picture_files(
    out: Path | None, kind: str | None, runs: "Sequence[Run]", prefixes: Sequence[str], *, sheet: bool = False
) -> list[tuple[Pictures, int]]:
    """Return for each of `runs` the files that it writes, and its index among their runs.

    `prefixes` are those of a workflow's pictures, if any: without `out`, each of several has its own names.
    """
    if out is None and len(prefixes) > 1:
        return [(Pictures(None, kind, [run], prefix=name), 0) for run, name in zip(runs, prefixes, strict=True)]
    files = Pictures(out, kind, runs, sheet=sheet, prefix=prefixes[0] if prefixes else None)
    return [(files, number) for number in range(len(runs))]


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    yield from (_beside(path, number) for number in itertools.count(1))


def _beside(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def _preview(out: Path) -> Path:
    return out.with_name(f"{out.stem}-preview.png")


def load_latents(path: Path | None) -> Any:
    """Return the array of a .npy file, None for no file. Raises UsageError for anything else."""
    if path is None:
        return None
    import numpy as np  # noqa: PLC0415

    try:
        with path.open("rb") as file:
            archive = file.read(len(_ZIP)) == _ZIP
        if not archive:
            # Mapped first: a header that claims more than the file holds fails before anything is allocated.
            with warnings.catch_warnings(action="ignore"):
                return np.array(np.load(path, mmap_mode="r", allow_pickle=False))
    except OSError as exc:
        raise explain_os_error(exc, f"--latents {path}") from exc
    except Exception as exc:  # numpy raises many kinds for an untrusted file
        raise UsageError(f"--latents {path}: not a .npy file of numbers ({str(exc)[:100]})") from exc
    raise UsageError(f"--latents {path}: is an .npz; save one of its arrays (initial) with numpy.save")


def save_latents(path: Path | None, run: "Run | None") -> None:
    """Write the latents of a run as .npz, atomically; nothing without a path."""
    if path is None or run is None:
        return
    import numpy as np  # noqa: PLC0415

    from sdxl_trt.engines.host import atomic_write  # noqa: PLC0415

    arrays = {"initial": run.initial, "final": run.final}
    if run.handoff_latents is not None:
        arrays["handoff"] = run.handoff_latents
    with atomic_write(path) as file:
        np.savez(file, allow_pickle=False, **arrays)
