"""The files of trt-generate: which they are, whether they can be written, noise in and latents out."""

__all__ = ["Pictures", "check_outputs", "load_latents", "save_latents"]

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_trt.engines.errors import UsageError, explain_os_error
from sdxl_trt.runtime.picture_files import FORMATS

if TYPE_CHECKING:
    from sdxl_trt.runtime.run import Run


def check_outputs(arguments: argparse.Namespace) -> None:
    """Find out before the work whether its results can be kept."""
    endings = {"-o": (arguments.out, _endings(arguments.format)), "--save-latents": (arguments.save_latents, (".npz",))}
    for option, (path, allowed) in endings.items():
        if path is None:
            continue
        if path.suffix.lower() not in allowed:
            raise UsageError(f"{option} {path}: give a name that ends in {' or '.join(allowed)}")
        if path.is_dir() or not path.parent.is_dir():
            raise UsageError(f"{option} {path}: is not a file in an existing folder; make the folder first")
    if arguments.save_latents and (arguments.sweep or arguments.prompts):
        raise UsageError("--save-latents keeps those of one request; leave --sweep and --prompts out")


def _endings(kind: str | None) -> tuple[str, ...]:
    """Return how the names of pictures may end, all of them where no format was asked for."""
    return tuple(ending for ending, name in FORMATS.items() if kind in (None, name.lower()))


_ZIP = b"PK\x03\x04"


class Pictures:
    """Where the pictures of a batch go: to `out` itself where there is one, else numbered beside it.

    With a `sheet`, `out` is the sheet's, and all pictures are numbered. No `out` is ``sdxl-<seed>`` here.
    """

    def __init__(self, out: Path | None, kind: str | None, runs: "Sequence[Run]", *, sheet: bool = False) -> None:
        counts = [len(run.request.seeds) for run in runs]
        self._firsts = [sum(counts[:number]) for number in range(len(counts))]
        self._alone = sum(counts) == 1 and not sheet
        self.out = out or Path(f"sdxl-{runs[0].request.seeds[0]}{_endings(kind or 'png')[0]}")

    @property
    def preview(self) -> Path:
        """Return the file that shows the running step."""
        return self.out.with_name(f"{self.out.stem}-preview.png")

    def path(self, number: int, picture: int) -> Path:
        """Return the file of picture `picture` of request `number`."""
        if self._alone:
            return self.out
        return self.out.with_name(f"{self.out.stem}-{self._firsts[number] + picture}{self.out.suffix}")


def load_latents(path: Path | None) -> Any:
    """Return the array of a .npy file, None for no file. Raises UsageError for anything else."""
    if path is None:
        return None
    import numpy as np  # noqa: PLC0415

    try:
        with path.open("rb") as file:
            archive = file.read(len(_ZIP)) == _ZIP
        if not archive:
            # Mapped first: a header that claims more than the file holds is found out before that is allocated.
            with warnings.catch_warnings(action="ignore"):
                return np.array(np.load(path, mmap_mode="r", allow_pickle=False))
    except OSError as exc:
        raise explain_os_error(exc, f"--latents {path}") from exc
    except Exception as exc:  # whatever numpy says of a file that nobody has vouched for
        raise UsageError(f"--latents {path}: not a .npy file of numbers ({str(exc)[:100]})") from exc
    raise UsageError(f"--latents {path}: is an .npz; save one of its arrays (initial) with numpy.save")


def save_latents(path: Path | None, run: "Run | None") -> None:
    """Write the latents of a run as .npz, atomically; nothing without a path."""
    if path is None or run is None:
        return
    import numpy as np  # noqa: PLC0415

    from sdxl_trt.engines.files import atomic_write  # noqa: PLC0415

    arrays = {"initial": run.initial, "final": run.final}
    if run.handoff is not None:
        arrays["handoff"] = run.handoff
    with atomic_write(path) as file:
        np.savez(file, allow_pickle=False, **arrays)
