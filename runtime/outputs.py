"""The files of trt-generate: which they are, whether they can be written, noise in and latents out."""

__all__ = ["check_outputs", "load_latents", "save_latents", "target"]

import argparse
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_trt.engines.errors import UsageError

if TYPE_CHECKING:
    from sdxl_trt.runtime.run import Run


def check_outputs(arguments: argparse.Namespace) -> None:
    """Find out before the work whether its results can be kept."""
    endings = {"-o": (arguments.out, ".png"), "--save-latents": (arguments.save_latents, ".npz")}
    for option, (path, ending) in endings.items():
        if path is None:
            continue
        if path.suffix.lower() != ending:
            raise UsageError(f"{option} {path}: give a name that ends in {ending}")
        if path.is_dir() or not path.parent.is_dir():
            raise UsageError(f"{option} {path}: is not a file in an existing folder; make the folder first")


def target(out: Path | None, seeds: tuple[int, ...], index: int) -> Path:
    """Return the file of picture `index`: `out` itself for one picture, numbered beside it for several."""
    path = out or Path(f"sdxl-{seeds[0]}.png")
    return path if len(seeds) == 1 else path.with_name(f"{path.stem}-{index}{path.suffix}")


def load_latents(path: Path | None) -> Any:
    """Return the array of a .npy file, None for no file. Raises UsageError for anything else."""
    if path is None:
        return None
    import numpy as np  # noqa: PLC0415

    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as exc:
        raise UsageError(f"--latents {path}: not a .npy file of numbers ({exc})") from exc
    if not isinstance(array, np.ndarray):
        raise UsageError(f"--latents {path}: is an .npz; save one of its arrays (initial) with numpy.save")
    return array


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
