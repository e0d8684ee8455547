"""Measured ranges in a file: an ``.npz`` archive with, for each component, the digest of its tensors and the ranges."""

__all__ = ["load_ranges", "save_ranges"]

import io
import lzma
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sdxl_trt.engines import CorruptError, UsageError, explain_os_error
from sdxl_trt.engines.host import atomic_write, one_line
from sdxl_trt.export.eight_bit import Ranges

_MOST_BYTES = 64 << 20
# What zipfile, its decompressors and numpy raise for damaged content: besides their own, RuntimeError for an encrypted
# member or an unknown compression, MemoryError for an array that states a shape of petabytes.
_DAMAGES = (ValueError, EOFError, KeyError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)
_DIGEST, _NAMES, _SPANS = "digest", "names", "spans"


def save_ranges(path: Path, found: Mapping[str, tuple[str, Ranges]]) -> None:
    """Write {component: (digest of its tensors, ranges)}; the file appears whole. Raises ResourceError."""
    arrays: dict[str, np.ndarray] = {}
    for name, (digest, ranges) in found.items():
        arrays[f"{name}/{_DIGEST}"] = np.array(digest)
        arrays[f"{name}/{_NAMES}"] = np.array(list(ranges.spans))
        arrays[f"{name}/{_SPANS}"] = np.array(list(ranges.spans.values()), np.float64)
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
    try:
        with atomic_write(path) as file:
            file.write(content.getvalue())
    except OSError as exc:
        raise explain_os_error(exc, f"writing --save-calibration {path}") from exc


def load_ranges(path: Path, wanted: Mapping[str, str]) -> dict[str, Ranges]:
    """Return the ranges of the components `wanted`, {name: digest of its tensors}.

    Raises UsageError for ranges of another model, CorruptError for a damaged file and for ranges that are no numbers.
    """
    told = f"--calibration {path}"
    arrays = _read(path, told)
    found: dict[str, Ranges] = {}
    for name, digest in wanted.items():
        try:
            stated, names, spans = (arrays[f"{name}/{part}"] for part in (_DIGEST, _NAMES, _SPANS))
        except KeyError:
            raise UsageError(f"{told}: has no ranges of {name}; measure them: give prompts instead") from None
        if not all(isinstance(part, np.ndarray) for part in (stated, names, spans)):
            raise CorruptError(f"{told}: the ranges of {name} are no arrays; measure them again")
        if str(stated) != digest:
            raise UsageError(f"{told}: the ranges of {name} were measured on another model, or with other LoRAs; give"
                             " prompts instead, or the model they belong to")  # fmt: skip
        if names.ndim != 1 or spans.shape != (len(names), 2) or spans.dtype.kind != "f" or names.dtype.kind != "U":
            raise CorruptError(f"{told}: the ranges of {name} are damaged; measure them again")
        found[name] = Ranges(name)
        for value, (low, high) in zip(names, spans, strict=True):
            if not (np.isfinite(low) and np.isfinite(high) and low <= high):
                raise CorruptError(f"{told}: the range of {one_line(str(value))} in {name} is {low:g} to {high:g}, no"
                                   " range of numbers; measure again")  # fmt: skip
            found[name].include(str(value), float(low), float(high))
    return found


def _read(path: Path, told: str) -> dict[str, np.ndarray]:
    """Return the arrays of the archive. Nothing in it is executed: numpy refuses pickled objects."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise CorruptError(f"{told}: larger than {_MOST_BYTES >> 20} MiB, so not a file of ranges")
        with zipfile.ZipFile(path) as archive:
            if sum(each.file_size for each in archive.infolist()) > _MOST_BYTES:
                raise CorruptError(f"{told}: unpacks to more than {_MOST_BYTES >> 20} MiB, so not a file of ranges")
        with np.load(path, allow_pickle=False) as content:
            return {name: content[name] for name in content.files}
    except OSError as exc:
        raise explain_os_error(exc, f"reading {told}") from exc
    except _DAMAGES as exc:
        raise CorruptError(f"{told}: is no file of ranges that --save-calibration wrote"
                           f" ({one_line(str(exc))[:120]})") from exc  # fmt: skip
